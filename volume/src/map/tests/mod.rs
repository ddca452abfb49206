//! The page map as a whole, over a store in memory.

mod bytes;
mod large;
mod memory;
mod model;
