"""Where weights come from: files, folders, adapters, hubs, object stores, modules.

Kept empty on purpose: `weft --help` must not pay for torch. Import the module you need.
"""
