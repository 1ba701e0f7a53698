"""The TensorBoard tab *ReLU Doctor*: what TensorBoard loads, and the data that the tab asks for.

TensorBoard finds it through the entry point ``tensorboard_plugins``. It reads event files through TensorBoard's data
provider only, so that it sees what TensorBoard sees, remote log directories too.
"""
