"""``python -m relu_doctor``."""

from relu_doctor.cli import main

if __name__ == "__main__":
    main()
