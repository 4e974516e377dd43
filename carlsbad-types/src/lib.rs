//! The plain types that two or more of the Carlsbad crates share, and nothing else: sizes and
//! rates with their units in the type, element types, and shapes.
//!
//! ```
//! use carlsbad_types::{Bandwidth, ByteSize, DType, Shape};
//!
//! let weights = Shape::from([384, 1536]);
//! let bytes = weights.byte_size(DType::F32).expect("fits in 64 bits");
//! assert_eq!(bytes.to_string(), "2.25 MiB");
//!
//! let copy: Bandwidth = "10 GB/s".parse().expect("a rate");
//! assert_eq!(copy.time_for(bytes).as_micros(), 235);
//! ```
//!
//! With the feature `serde` every type serializes: sizes and rates as a plain number of bytes
//! (per second), dtypes by their name, shapes as a list.
#![forbid(unsafe_code)]

mod bandwidth;
mod byte_size;
mod dtype;
mod quantity;
mod shape;

pub use bandwidth::Bandwidth;
pub use byte_size::ByteSize;
pub use dtype::{DType, UnknownDType};
pub use quantity::ParseQuantityError;
pub use shape::Shape;
