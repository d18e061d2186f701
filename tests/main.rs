//! The system tests, one binary.

// How a batch is cut, ordered and kept changes nothing.
mod gradcache;
// The same numbers as transformers, PEFT and sentence-transformers.
mod parity;
