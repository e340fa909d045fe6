"""Why a merge works, or not: what two checkpoints differ in, what one of them holds."""
