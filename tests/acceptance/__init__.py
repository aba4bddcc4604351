"""The product from the outside: ``python main.py`` as a process, against servers over the wire."""
