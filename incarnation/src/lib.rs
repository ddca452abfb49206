//! One incarnation of an agent: what it does with the drives of the cluster and with the volumes that it owns (design section 5).
//!
//! ```text
//!  cluster map ─► ownership ─ take over, serve, hand over, delete ─► engines (weft-volume)
//!                    │ │                                               │ Seams
//!                    │ └─ fence ─► fabric ◄─ lease, drives ────────────┤
//!                    │               │ Reach                           │
//!                    │            each drive: local_drive, or the      │
//!                    │            agent's, over the wire               │
//!                    └──────────► metadata ◄─ directory ◄──────────────┘
//! ```
//!
//! Promises:
//!
//! - **An incarnation registers with a drive once.** A registration that is missing later means that it was fenced, and ends it.
//! - **An epoch is served only** after every incarnation that died was fenced on n − m drives of each of its bands, that is on record, the
//!   former epoch was recovered, and the former owner's lease has run out.
//! - **An epoch that cannot go on ends its incarnation**, if the cluster still holds it to be the owner.
//!
//! It reads no clock and spawns on no runtime of its own: time and tasks come from [`weft_volume::seams::Env`], so that
//! the agent runs it over tokio and the simulator over simulated time, unchanged. What is woken is woken in order.
//!
//! It does not speak NVMe or gRPC: how a drive is reached is [`fabric::Reach`], how the metadata service is asked
//! [`metadata::Metadata`]. What becomes of volumes is told to an [`ownership::Observer`].

pub mod bounds;
pub mod directory;
pub mod fabric;
pub mod local_drive;
pub mod metadata;
pub mod ownership;
pub mod published;
pub mod silence;
mod time;
