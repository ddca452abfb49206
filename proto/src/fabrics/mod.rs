//! NVMe over Fabrics: Connect, properties, Disconnect and the discovery log page.
//!
//! Wire layout and the checks that a command can fail on its own. Which controller a Connect makes, and who may,
//! is decided in `target`.
//!
//! NVM Express Base Specification 2.0, "Fabrics Command Set" and "Discovery Service".

pub mod command;
pub mod discovery;
pub mod property;
