"""One file a method; :mod:`patcher.unlearn.registry` lists them."""
