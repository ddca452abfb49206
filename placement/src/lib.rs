//! Which drives hold a band: pure functions over failure domains and free capacity.
//!
//! - [`propose`]: bands onto drives, a batch at a time; [`propose_replacement`]: a fresh drive for one column.
//! - [`depth_mib`]: how much of unequal domains bands can reach at all.
//!
//! It promises:
//! - The columns of a band lie in distinct failure domains of the policy's level. Where domains are scarce k
//!   shrinks; m and the distance of shards never do.
//! - Domains, and drives within them, are used in proportion to their free space, within a batch too; and a batch
//!   that fits in any way is placed.
//! - Equal input gives equal output: no clock, no randomness but the seed, integers only.
//! - **Minimal movement**: a band's columns stay where they are. A changed topology changes where later bands go; a
//!   replacement moves one column and leaves the others.
//!
//! It commits nothing and remembers nothing: the metadata service checks a proposal again when it is applied. Moving
//! sealed bands when drives are filled unevenly is not decided here yet; it will be a function beside these, from a
//! topology and the bands on it to a list of columns worth a [`propose_replacement`].
//!
//! Design section 6; `docs/design/placement.md`.

mod depth;
mod propose;
mod request;
mod spread;
mod survivable;
mod topology;

pub use depth::depth_mib;
pub use propose::{propose, propose_replacement};
pub use request::{Placement, Policy, Refusal, Request, WouldFit};
pub use survivable::Survivable;
pub use topology::{Domain, DomainLevel, Drive, FreeChunks, Home, Topology};
pub use weft_proto::band::DriveClass;
