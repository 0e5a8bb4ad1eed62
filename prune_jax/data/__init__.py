"""The data sets that ship with the package; README.md beside this file says where they come from."""
