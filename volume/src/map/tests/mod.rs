//! The page map as a whole, over a store in memory.

mod bytes;
mod garbage;
mod large;
mod memory;
mod model;
