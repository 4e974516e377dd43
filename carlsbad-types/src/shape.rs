use std::fmt;
use std::ops::Deref;

use crate::{ByteSize, DType};

/// The extents of a tensor, outermost first; no extents for a scalar.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(transparent)
)]
pub struct Shape(Vec<usize>);

impl Shape {
    /// Elements: the product of the extents, 1 for a scalar, or `None` on overflow. Once an extent
    /// is zero there are none, whatever the others are.
    pub fn elements(&self) -> Option<usize> {
        if self.0.contains(&0) {
            return Some(0);
        }
        self.0
            .iter()
            .try_fold(1usize, |product, &extent| product.checked_mul(extent))
    }

    /// Bytes of a dense tensor of this shape, or `None` on overflow.
    pub fn byte_size(&self, dtype: DType) -> Option<ByteSize> {
        let bytes = self.elements()?.checked_mul(dtype.size())?;
        Some(ByteSize::new(bytes as u64))
    }

    /// The extents.
    pub fn dims(&self) -> &[usize] {
        &self.0
    }

    /// How many extents there are.
    pub fn rank(&self) -> usize {
        self.0.len()
    }
}

impl Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.0
    }
}

impl From<Vec<usize>> for Shape {
    fn from(extents: Vec<usize>) -> Self {
        Self(extents)
    }
}

impl From<&[usize]> for Shape {
    fn from(extents: &[usize]) -> Self {
        Self(extents.to_vec())
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(extents: [usize; N]) -> Self {
        Self(extents.to_vec())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, extent) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{extent}")?;
        }
        f.write_str("]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_elements_without_overflow() {
        assert_eq!(Shape::from([]).elements(), Some(1));
        assert_eq!(Shape::from([3, 4]).elements(), Some(12));
        assert_eq!(Shape::from([usize::MAX, 0]).elements(), Some(0));
        assert_eq!(Shape::from([usize::MAX, 2]).elements(), None);
        assert_eq!(Shape::from([usize::MAX / 2]).byte_size(DType::F32), None);
    }

    #[test]
    fn shows_its_extents() {
        assert_eq!(Shape::from([384, 1536]).to_string(), "[384, 1536]");
        assert_eq!(Shape::default().to_string(), "[]");
    }
}
