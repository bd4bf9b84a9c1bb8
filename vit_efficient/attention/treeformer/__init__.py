"""Treeformer: attention by learned trees, and the leaves that tokens fall into."""
