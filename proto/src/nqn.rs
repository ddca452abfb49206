//! NVMe Qualified Names (NVM Express Base, "NVMe Qualified Names").

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The well-known name of the discovery subsystem (NVMe over Fabrics, "Discovery Service").
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";

/// A checked NVMe Qualified Name. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Nqn(Arc<str>);

impl Nqn {
    /// Longest name in bytes, without the terminating NUL of its 224 or 256 byte fields.
    pub const LEN_MAX: usize = 223;

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The discovery subsystem's well-known name.
    #[must_use]
    pub fn discovery() -> Self {
        Self(DISCOVERY_NQN.into())
    }

    /// From a NUL-padded field of a structure.
    ///
    /// # Errors
    /// [`InvalidNqn`] if the field is not terminated, not UTF-8 or not a name.
    pub fn from_field(field: &[u8]) -> Result<Self, InvalidNqn> {
        let len = field
            .iter()
            .position(|&byte| byte == 0)
            .ok_or(InvalidNqn::Unterminated)?;
        std::str::from_utf8(&field[..len])
            .map_err(|_| InvalidNqn::NotUtf8)?
            .parse()
    }
}

/// Why text is not an NQN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidNqn {
    /// A structure's field has no NUL.
    #[error("name is not NUL-terminated")]
    Unterminated,
    /// Names are UTF-8.
    #[error("name is not UTF-8")]
    NotUtf8,
    /// Bytes of the name.
    #[error("name has {0} bytes, at most 223 are allowed")]
    TooLong(usize),
    /// Every name begins with `nqn.`.
    #[error("name does not begin with `nqn.`")]
    Prefix,
}

impl std::str::FromStr for Nqn {
    type Err = InvalidNqn;

    fn from_str(s: &str) -> Result<Self, InvalidNqn> {
        if s.len() > Self::LEN_MAX {
            return Err(InvalidNqn::TooLong(s.len()));
        }
        if !s.starts_with("nqn.") {
            return Err(InvalidNqn::Prefix);
        }
        Ok(Self(s.into()))
    }
}

impl TryFrom<String> for Nqn {
    type Error = InvalidNqn;
    fn try_from(s: String) -> Result<Self, InvalidNqn> {
        s.parse()
    }
}

impl From<Nqn> for String {
    fn from(nqn: Nqn) -> Self {
        nqn.as_str().to_owned()
    }
}

impl fmt::Display for Nqn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Nqn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded_and_prefixed() {
        let longest = format!("nqn.{}", "x".repeat(219));
        assert_eq!(longest.parse::<Nqn>().unwrap().as_str().len(), 223);
        assert_eq!(
            format!("{longest}x").parse::<Nqn>(),
            Err(InvalidNqn::TooLong(224))
        );
        assert_eq!("iqn.2014".parse::<Nqn>(), Err(InvalidNqn::Prefix));
    }

    #[test]
    fn a_field_without_an_end_is_refused() {
        assert_eq!(Nqn::from_field(b"nqn.a"), Err(InvalidNqn::Unterminated));
        assert_eq!(Nqn::from_field(b"nqn.a\0\0").unwrap().as_str(), "nqn.a");
        assert_eq!(Nqn::from_field(b"nqn.\xff\0"), Err(InvalidNqn::NotUtf8));
    }
}
