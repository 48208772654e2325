"""Tables of requests and of outputs: files of several formats, frames, and URLs, read and written row by row."""
