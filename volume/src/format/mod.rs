//! What the engine writes on drives, byte by byte. `docs/format/stripe.md` is the same as a page.

pub mod checksum;
pub mod header;
