//! infonce
