"""Forwards while they are watched: which calls they make, to which sites these belong, and what is measured."""
