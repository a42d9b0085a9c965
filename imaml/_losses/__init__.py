"""The losses of a chunk of tasks at flat parameters: layout, slices, random draws, what a call is given and does."""
