"""Code that runs inside the sandbox: standard library only, imported by path in a bare interpreter."""
