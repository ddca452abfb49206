//! NVMe controllers presented to hosts and peers over NVMe/TCP.

pub mod metrics;
pub mod reservation;
pub mod status;

/// An error and its causes as one line.
pub(crate) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line = format!("{line}: {cause}");
        source = cause.source();
    }
    line
}
