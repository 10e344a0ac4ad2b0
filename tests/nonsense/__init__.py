"""A generator of bad input, and a judge of what burnish says to it.

Every :class:`Case` says by construction whether it must be refused. :func:`judge` runs the real entry and demands a
`BurnishError` that names the thing, within seconds and without a warning; or, where the input may be good, no other
error than that.
"""
