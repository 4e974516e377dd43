//! Element types: the plain ones, and GGUF's block-quantised ones.

use std::fmt;

use carlsbad_types::{ByteSize, DType, Shape};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ElementType {
    /// One element, one number.
    Plain(DType),
    /// Elements quantised in blocks along the innermost extent.
    Block(BlockType),
}

macro_rules! block_types {
    ($($name:ident = $code:literal, $elements:literal, $bytes:literal;)*) => {
        /// A block-quantised type of ggml. Codes, elements and bytes of a block are those of
        /// `ggml.h` and of the GGUF specification.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[allow(non_camel_case_types, reason = "ggml's own names, which users search for")]
        #[allow(missing_docs, reason = "each is documented by the table in ggml.h")]
        #[non_exhaustive]
        pub enum BlockType { $($name),* }

        impl BlockType {
            /// Every block type.
            pub const ALL: &[Self] = &[$(Self::$name),*];
            /// `ggml_type`, as it stands in a GGUF file.
            pub const fn code(self) -> u32 { match self { $(Self::$name => $code),* } }
            /// ggml's name.
            pub const fn name(self) -> &'static str { match self { $(Self::$name => stringify!($name)),* } }
            /// Elements in a block.
            pub const fn block_elements(self) -> usize { match self { $(Self::$name => $elements),* } }
            /// Bytes in a block.
            pub const fn block_bytes(self) -> usize { match self { $(Self::$name => $bytes),* } }
        }
    };
}

block_types! {
    Q4_0 = 2, 32, 18;
    Q4_1 = 3, 32, 20;
    Q5_0 = 6, 32, 22;
    Q5_1 = 7, 32, 24;
    Q8_0 = 8, 32, 34;
    Q8_1 = 9, 32, 36;
    Q2_K = 10, 256, 84;
    Q3_K = 11, 256, 110;
    Q4_K = 12, 256, 144;
    Q5_K = 13, 256, 176;
    Q6_K = 14, 256, 210;
    Q8_K = 15, 256, 292;
    IQ2_XXS = 16, 256, 66;
    IQ2_XS = 17, 256, 74;
    IQ3_XXS = 18, 256, 98;
    IQ1_S = 19, 256, 50;
    IQ4_NL = 20, 32, 18;
    IQ3_S = 21, 256, 110;
    IQ2_S = 22, 256, 82;
    IQ4_XS = 23, 256, 136;
    IQ1_M = 29, 256, 56;
    TQ1_0 = 34, 256, 54;
    TQ2_0 = 35, 256, 66;
    MXFP4 = 39, 32, 17;
}

impl ElementType {
    /// The name that goes into identities and manifests.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain(dtype) => dtype.name(),
            Self::Block(block) => block.name(),
        }
    }

    /// The element type of that name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        if let Ok(dtype) = name.parse::<DType>() {
            return Some(Self::Plain(dtype));
        }
        let block = BlockType::ALL.iter().find(|block| block.name() == name)?;
        Some(Self::Block(*block))
    }

    /// The alignment at which elements can be read in place, in bytes; every tensor's size is a
    /// multiple of it.
    pub const fn alignment(self) -> usize {
        match self {
            Self::Plain(dtype) => dtype.size(),
            // ggml reads blocks through structs, whose alignment divides their size.
            Self::Block(block) => {
                let natural = 1 << block.block_bytes().trailing_zeros();
                if natural < 8 { natural } else { 8 }
            }
        }
    }

    /// Bytes of a dense tensor of this type and shape.
    ///
    /// # Errors
    /// [`Error::BadShape`] where the size overflows, or the innermost extent is no whole number of
    /// blocks.
    pub fn byte_size(self, shape: &Shape) -> Result<ByteSize> {
        let bad = |why| Error::BadShape {
            element: self.name(),
            shape: shape.clone(),
            why,
        };
        match self {
            Self::Plain(dtype) => shape
                .byte_size(dtype)
                .ok_or_else(|| bad("more bytes than 64 bits can count")),
            Self::Block(block) => {
                let innermost = shape.dims().last().copied().unwrap_or(1);
                if innermost % block.block_elements() != 0 {
                    return Err(bad("the innermost extent is no whole number of blocks"));
                }
                let elements = shape
                    .elements()
                    .ok_or_else(|| bad("more elements than 64 bits can count"))?;
                (elements / block.block_elements())
                    .checked_mul(block.block_bytes())
                    .map(|bytes| ByteSize::new(bytes as u64))
                    .ok_or_else(|| bad("more bytes than 64 bits can count"))
            }
        }
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl From<DType> for ElementType {
    fn from(dtype: DType) -> Self {
        Self::Plain(dtype)
    }
}
