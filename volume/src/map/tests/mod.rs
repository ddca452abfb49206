//! The page map as a whole, over a store in memory.

mod memory;
mod model;
