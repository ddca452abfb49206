//! Wire formats and the words every crate shares. No I/O, no clock, no policy.
//!
//! - [`id`], [`units`], [`nqn`]: newtypes for whatever could be mistaken for something else;
//! - [`metric`]: what a metric is;
//! - [`deliberate`]: bugs that a test can plant, and nothing that is shipped contains;
//! - [`band`]: where a volume's bytes lie, as metadata grants it and the volume engine writes it;
//! - [`nvme`], [`fabrics`], `tcp`: the public specifications' structures, each with its section cited;
//! - `grpc` (feature `grpc`): the control services.
//!
//! Architecture invariant: nothing here acts. Parsing gives a typed value or an error, and what the
//! value means is decided in `target`, `initiator`, `metadata` or `volume`.

pub mod band;
pub mod deliberate;
pub mod fabrics;
#[cfg(feature = "grpc")]
pub mod grpc;
pub mod id;
pub mod metric;
pub mod nqn;
pub mod nvme;
pub mod tcp;
pub mod units;
