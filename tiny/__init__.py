"""The small worlds that ship with the package, trained as the released ones are built."""
