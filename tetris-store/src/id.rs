//! Names that follow from content.
//!
//! The paper names a tensor by a 32-bit CRC of its bytes. By the birthday bound,
//! 1 - exp(-n^2 / 2^33), two of n = 10,000 tensors share a name with a chance of 1.2 %, two of
//! 77,000 with one of a half. Here a name is a 256-bit BLAKE3 hash of everything that makes two
//! tensors the same: element type, shape and bytes.

use std::fmt;
use std::str::FromStr;

use carlsbad_types::Shape;
use serde::{Deserialize, Serialize};

use crate::element::ElementType;
use crate::error::{Error, Result};

/// Whoever may know of each other's tensors: a salt that goes into every identity.
///
/// In one domain, anybody who can ask "is this tensor here?" learns whether somebody else has
/// loaded a model that contains it. Tenants who must not learn that get domains of their own, and
/// share nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Domain(String);

impl Domain {
    /// The domain called `name`. The default domain has the empty name.
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// The name it was made with.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// A hasher whose every digest belongs to this domain and to `purpose` alone.
    pub(crate) fn hasher(&self, purpose: &str) -> blake3::Hasher {
        let context = format!("tetris-store 1 {purpose} in domain `{}`", self.0);
        blake3::Hasher::new_derive_key(&context)
    }
}

macro_rules! content_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name([u8; 32]);

        impl $name {
            /// The digest itself.
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            pub(crate) fn finish(hasher: &blake3::Hasher) -> Self {
                Self(*hasher.finalize().as_bytes())
            }
        }

        impl fmt::Display for $name {
            /// 64 hexadecimal digits, or the first `N` of them with `{:.N}`.
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&blake3::Hash::from_bytes(self.0).to_hex())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:.12})"), self)
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self> {
                blake3::Hash::from_hex(text)
                    .map(|hash| Self(*hash.as_bytes()))
                    .map_err(|_| Error::BadId { what: $what, text: text.chars().take(80).collect() })
            }
        }

        /// The id with this digest, which has 32 bytes.
        impl TryFrom<&[u8]> for $name {
            type Error = std::array::TryFromSliceError;
            fn try_from(digest: &[u8]) -> Result<Self, Self::Error> {
                digest.try_into().map(Self)
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(text: String) -> Result<Self> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }
    };
}

content_id!(
    /// What a tensor is: BLAKE3 over the domain, the element type, the shape and the bytes.
    TensorId,
    "tensor id"
);
content_id!(
    /// What a stored file is: a single tensor, or a pack of small ones.
    ObjectId,
    "object id"
);
content_id!(
    /// What a model is: BLAKE3 over its format, its tensors by name, and its sidecar files.
    ModelId,
    "model id"
);

impl TensorId {
    /// The identity of a dense tensor in row-major order whose bytes have the BLAKE3 digest
    /// `content`. That digest is taken over the bytes alone, so that the subtrees of one large
    /// tensor can be hashed on several threads (BLAKE3 §2.1).
    pub(crate) fn from_content(
        domain: &Domain,
        element: ElementType,
        shape: &Shape,
        content: &blake3::Hash,
    ) -> Self {
        let mut hasher = domain.hasher("tensor");
        // Length-prefixed, so that no two (type, shape) pairs feed the same bytes.
        let name = element.name();
        hasher.update(&[name.len() as u8]).update(name.as_bytes());
        hasher.update(&(shape.rank() as u64).to_le_bytes());
        for &extent in shape.dims() {
            hasher.update(&(extent as u64).to_le_bytes());
        }
        hasher.update(content.as_bytes());
        Self::finish(&hasher)
    }

    /// The identity of a dense tensor held in memory.
    pub fn of(domain: &Domain, element: ElementType, shape: &Shape, bytes: &[u8]) -> Self {
        Self::from_content(domain, element, shape, &blake3::hash(bytes))
    }
}

impl ObjectId {
    /// The file that holds this one tensor. Its name in a model plays no part.
    pub(crate) fn single(tensor: &TensorId) -> Self {
        let mut hasher = Domain::default().hasher("single object");
        hasher.update(tensor.as_bytes());
        Self::finish(&hasher)
    }

    /// The file that holds these tensors under these names, in this order.
    pub(crate) fn pack<'a>(members: impl Iterator<Item = (&'a str, &'a TensorId)>) -> Self {
        let mut hasher = Domain::default().hasher("pack object");
        for (name, tensor) in members {
            hasher.update(&(name.len() as u64).to_le_bytes());
            hasher.update(name.as_bytes()).update(tensor.as_bytes());
        }
        Self::finish(&hasher)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use carlsbad_types::DType;

    #[test]
    fn type_shape_bytes_and_domain_all_count() {
        let open = Domain::default();
        let f32s = ElementType::Plain(DType::F32);
        let square = Shape::from([2, 2]);
        let zeros = [0u8; 16];
        let base = TensorId::of(&open, f32s, &square, &zeros);
        assert_eq!(base, TensorId::of(&open, f32s, &square, &zeros));
        let others = [
            TensorId::of(&open, ElementType::Plain(DType::I32), &square, &zeros),
            TensorId::of(&open, f32s, &Shape::from([4, 1]), &zeros),
            TensorId::of(&open, f32s, &square, &[1u8; 16]),
            TensorId::of(&Domain::new("tenant"), f32s, &square, &zeros),
        ];
        for other in others {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn ids_read_back_and_reject_what_is_none() {
        let id = TensorId::of(
            &Domain::default(),
            ElementType::Plain(DType::U8),
            &Shape::from([0]),
            &[],
        );
        assert_eq!(id.to_string().parse::<TensorId>().unwrap(), id);
        for bad in [
            "",
            "../../etc/passwd",
            "zz",
            &"a".repeat(63),
            &"g".repeat(64),
        ] {
            assert!(bad.parse::<TensorId>().is_err(), "{bad}");
        }
    }
}
