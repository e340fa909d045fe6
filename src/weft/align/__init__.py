"""Before merging: a network's symmetries, found, and two networks brought into one order by them."""
