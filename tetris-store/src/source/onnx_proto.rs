//! The parts of `onnx.proto` that matter here: field numbers by message, data types, and where in
//! a model a tensor can be (github.com/onnx/onnx, IR version 11).

use carlsbad_types::DType;

pub(crate) mod model {
    pub(crate) const GRAPH: u32 = 7;
    pub(crate) const TRAINING_INFO: u32 = 20;
    pub(crate) const FUNCTIONS: u32 = 25;
}
pub(crate) mod graph {
    pub(crate) const NODE: u32 = 1;
    pub(crate) const INITIALIZER: u32 = 5;
    pub(crate) const SPARSE_INITIALIZER: u32 = 15;
}
pub(crate) mod training {
    pub(crate) const INITIALIZATION: u32 = 1;
    pub(crate) const ALGORITHM: u32 = 2;
}
pub(crate) mod function {
    pub(crate) const NODE: u32 = 7;
}
pub(crate) mod node {
    pub(crate) const ATTRIBUTE: u32 = 5;
}
pub(crate) mod attribute {
    pub(crate) const TENSOR: u32 = 5;
    pub(crate) const GRAPH: u32 = 6;
    pub(crate) const TENSORS: u32 = 10;
    pub(crate) const GRAPHS: u32 = 11;
    pub(crate) const SPARSE_TENSOR: u32 = 22;
    pub(crate) const SPARSE_TENSORS: u32 = 23;
}
pub(crate) mod sparse {
    pub(crate) const VALUES: u32 = 1;
    pub(crate) const INDICES: u32 = 2;
}
pub(crate) mod tensor {
    pub(crate) const DIMS: u32 = 1;
    pub(crate) const DATA_TYPE: u32 = 2;
    pub(crate) const SEGMENT: u32 = 3;
    pub(crate) const FLOAT_DATA: u32 = 4;
    pub(crate) const INT32_DATA: u32 = 5;
    pub(crate) const STRING_DATA: u32 = 6;
    pub(crate) const INT64_DATA: u32 = 7;
    pub(crate) const NAME: u32 = 8;
    pub(crate) const RAW_DATA: u32 = 9;
    pub(crate) const DOUBLE_DATA: u32 = 10;
    pub(crate) const UINT64_DATA: u32 = 11;
    pub(crate) const EXTERNAL_DATA: u32 = 13;
    pub(crate) const DATA_LOCATION: u32 = 14;
}
pub(crate) mod entry {
    pub(crate) const KEY: u32 = 1;
    pub(crate) const VALUE: u32 = 2;
}

/// Whether a file that starts with `key` may be a `ModelProto`.
pub(crate) fn may_begin(key: u8) -> bool {
    // Keys of fields 1 (ir_version) and 5 (model_version) are varints, the others
    // length-delimited; fields from 16 on have longer keys and never come first in practice.
    matches!(key, 0x08 | 0x28) || (key & 7 == 2 && matches!(key >> 3, 2..=4 | 6..=8 | 14))
}

/// `TensorProto.DataType`: the element type where the store has a name for it, the bits of one
/// element, and the bytes each entry of the typed data field stands for.
#[derive(Debug, Clone, Copy)]
pub(super) struct DataType {
    pub(super) dtype: Option<DType>,
    pub(super) bits: u64,
    pub(super) typed_field: u32,
    pub(super) typed_bytes: usize,
}

impl DataType {
    pub(super) const STRING: u64 = 8;

    pub(super) fn from_code(code: u64) -> Option<Self> {
        let (dtype, bits, typed_field, typed_bytes) = match code {
            1 => (Some(DType::F32), 32, tensor::FLOAT_DATA, 4),
            2 => (Some(DType::U8), 8, tensor::INT32_DATA, 1),
            3 => (Some(DType::I8), 8, tensor::INT32_DATA, 1),
            4 => (Some(DType::U16), 16, tensor::INT32_DATA, 2),
            5 => (Some(DType::I16), 16, tensor::INT32_DATA, 2),
            6 => (Some(DType::I32), 32, tensor::INT32_DATA, 4),
            7 => (Some(DType::I64), 64, tensor::INT64_DATA, 8),
            9 => (Some(DType::Bool), 8, tensor::INT32_DATA, 1),
            10 => (Some(DType::F16), 16, tensor::INT32_DATA, 2),
            11 => (Some(DType::F64), 64, tensor::DOUBLE_DATA, 8),
            12 => (Some(DType::U32), 32, tensor::UINT64_DATA, 4),
            13 => (Some(DType::U64), 64, tensor::UINT64_DATA, 8),
            // Complex numbers: pairs of floats or doubles.
            14 => (None, 64, tensor::FLOAT_DATA, 4),
            15 => (None, 128, tensor::DOUBLE_DATA, 8),
            16 => (Some(DType::BF16), 16, tensor::INT32_DATA, 2),
            17 => (Some(DType::F8E4M3), 8, tensor::INT32_DATA, 1),
            19 => (Some(DType::F8E5M2), 8, tensor::INT32_DATA, 1),
            // FLOAT8E4M3FNUZ, FLOAT8E5M2FNUZ, FLOAT8E8M0.
            18 | 20 | 24 => (None, 8, tensor::INT32_DATA, 1),
            // UINT4, INT4, FLOAT4E2M1: two to a byte, the first in the lower half.
            21..=23 => (None, 4, tensor::INT32_DATA, 1),
            // UINT2, INT2: four to a byte.
            25 | 26 => (None, 2, tensor::INT32_DATA, 1),
            _ => return None,
        };
        Some(Self {
            dtype,
            bits,
            typed_field,
            typed_bytes,
        })
    }
}

/// Messages that a tensor can be in.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Training,
    Function,
    Graph,
    Node,
    Attribute,
    Sparse,
    Tensor,
}

impl Kind {
    /// What the length-delimited field `number` of this message is, if a tensor can be in it.
    pub(super) fn within(self, number: u32) -> Option<Self> {
        match (self, number) {
            (Self::Training, training::INITIALIZATION | training::ALGORITHM)
            | (Self::Attribute, attribute::GRAPH | attribute::GRAPHS) => Some(Self::Graph),
            (Self::Function, function::NODE) | (Self::Graph, graph::NODE) => Some(Self::Node),
            (Self::Node, node::ATTRIBUTE) => Some(Self::Attribute),
            (Self::Graph, graph::INITIALIZER)
            | (Self::Attribute, attribute::TENSOR | attribute::TENSORS)
            | (Self::Sparse, sparse::VALUES | sparse::INDICES) => Some(Self::Tensor),
            (Self::Graph, graph::SPARSE_INITIALIZER)
            | (Self::Attribute, attribute::SPARSE_TENSOR | attribute::SPARSE_TENSORS) => {
                Some(Self::Sparse)
            }
            _ => None,
        }
    }
}
