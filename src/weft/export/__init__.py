"""Where merged models go besides the disk: the Hub, and the formats of other programs."""
