//! The key that all nodes of a fabric hold.

use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::error::{Error, Result};

/// 32 secret bytes that every node of a fabric holds. Who holds it is trusted with every region
/// that any of them publishes.
#[derive(Clone)]
pub struct PresharedKey([u8; 32]);

impl PresharedKey {
    /// These bytes. They have to be random.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// From a file of 64 hexadecimal digits (`openssl rand -hex 32`), which nobody but its owner may
    /// read.
    ///
    /// # Errors
    /// [`Error::BadKey`] where the file holds something else or others may read it; [`Error::Io`].
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let io = |source| Error::Io {
            what: "read the file with the key",
            source,
        };
        let bad = |why| Error::BadKey {
            path: path.to_owned(),
            why,
        };
        let mode = std::fs::metadata(path).map_err(io)?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(bad("others may read it: chmod 600"));
        }
        let text = std::fs::read_to_string(path).map_err(io)?;
        Self::parse(text.trim()).ok_or_else(|| bad("it has to be 64 hexadecimal digits"))
    }

    fn parse(text: &str) -> Option<Self> {
        let digits = text.as_bytes();
        if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
        }
        Some(Self(bytes))
    }

    pub(super) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(secret)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_is_64_digits_that_only_its_owner_reads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let write = |text: &str, mode| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            PresharedKey::from_file(&path)
        };
        let digits = "0123456789abcdefABCDEF00000000000000000000000000000000000000ff10";
        let key = write(&format!("{digits}\n"), 0o600).unwrap();
        assert_eq!((key.bytes()[0], key.bytes()[31]), (0x01, 0x10));
        assert_eq!(format!("{key:?}"), "PresharedKey(secret)");
        for (text, mode) in [
            (digits, 0o640),
            (&digits[1..], 0o600),
            ("", 0o600),
            (&digits.replace('0', "é"), 0o600),
            (&digits.replace('0', "+"), 0o600),
        ] {
            let refused = write(text, mode);
            assert!(matches!(refused, Err(Error::BadKey { .. })), "{refused:?}");
        }
    }
}
