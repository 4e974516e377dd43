//! A linear layer over mapped bytes, for programs that keep their own global allocator.

use std::sync::Arc;

use candle_core::{
    CpuStorage, CustomOp1, DType, Device, Error, Layout, Module, Result, Shape, Tensor, WithDType,
};
use gemm::{Parallelism, gemm};
use half::slice::HalfFloatSliceExt;
use half::vec::HalfFloatVecExt;

use super::storage::CandleType;
use crate::attach::SharedModel;

/// `y = x W^T + b`, with `W` read where the store keeps it.
///
/// It needs no allocator of its own and no unsafe promise: the mapping is read-only, and the layer
/// keeps the model attached. Outputs are equal, bit by bit, to those of candle's own layer, for it
/// makes the same calls of the same matrix multiplication. It serves inference: there is no
/// gradient. The bias, a few kilobytes, is a copy.
#[derive(Debug, Clone)]
pub struct MappedLinear {
    weight: MappedWeight,
    bias: Option<Tensor>,
}

impl MappedLinear {
    /// The layer with the weights `{path}.weight` of shape (out, in) and, where there is one, the
    /// bias `{path}.bias` of shape (out).
    ///
    /// # Errors
    /// Where the model has no such weights, or they are no matrix of a type that candle multiplies
    /// on the CPU: f16, bf16, f32 or f64.
    pub fn load(model: &Arc<SharedModel>, path: &str) -> Result<Self> {
        let weight = MappedWeight::new(model, format!("{path}.weight"))?;
        let bias = format!("{path}.bias");
        let bias = match model.manifest().tensor(&bias) {
            None => None,
            Some(entry) if entry.shape.dims() != [weight.rows] => {
                return Err(Error::msg(format!(
                    "bias {bias} is {}, for weights with {} rows",
                    entry.shape, weight.rows
                )));
            }
            Some(entry) => {
                let CandleType::Same(dtype) = CandleType::of(entry.element) else {
                    return Err(Error::msg(format!(
                        "bias {bias} is of type {}",
                        entry.element
                    )));
                };
                let bytes = model.tensor(&bias).map_err(Error::wrap)?.bytes;
                let dims = entry.shape.dims();
                Some(Tensor::from_raw_buffer(bytes, dtype, dims, &Device::Cpu)?)
            }
        };
        Ok(Self { weight, bias })
    }

    /// Extent of the input's last dimension.
    pub const fn in_features(&self) -> usize {
        self.weight.columns
    }

    /// Extent of the output's last dimension.
    pub const fn out_features(&self) -> usize {
        self.weight.rows
    }
}

impl Module for MappedLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let product = match *x.dims() {
            // As candle's layer does: one multiplication instead of one for each of the batch.
            [.., columns] if x.rank() > 2 && x.is_contiguous() => {
                let rows = x.elem_count() / columns.max(1);
                let mut dims = x.dims().to_vec();
                if let Some(last) = dims.last_mut() {
                    *last = self.weight.rows;
                }
                x.reshape((rows, columns))?
                    .apply_op1_no_bwd(&self.weight)?
                    .reshape(dims)?
            }
            _ => x.apply_op1_no_bwd(&self.weight)?,
        };
        match &self.bias {
            None => Ok(product),
            Some(bias) => product.broadcast_add(bias),
        }
    }
}

/// A matrix of the store, to multiply by its transpose.
#[derive(Debug, Clone)]
struct MappedWeight {
    model: Arc<SharedModel>,
    name: String,
    dtype: DType,
    rows: usize,
    columns: usize,
}

impl MappedWeight {
    fn new(model: &Arc<SharedModel>, name: String) -> Result<Self> {
        let entry = model.tensor(&name).map_err(Error::wrap)?.entry;
        let no_matrix = || {
            Error::msg(format!(
                "weights {name} are {} {}: expected a matrix of f16, bf16, f32 or f64",
                entry.element, entry.shape
            ))
        };
        let &[rows, columns] = entry.shape.dims() else {
            return Err(no_matrix());
        };
        let dtype = match CandleType::of(entry.element) {
            CandleType::Same(dtype @ (DType::F16 | DType::BF16 | DType::F32 | DType::F64)) => dtype,
            _ => return Err(no_matrix()),
        };
        Ok(Self {
            model: Arc::clone(model),
            name,
            dtype,
            rows,
            columns,
        })
    }

    /// The matrix, row by row.
    fn elements<T: WithDType>(&self) -> Result<&[T]> {
        let bytes = self.model.tensor(&self.name).map_err(Error::wrap)?.bytes;
        // SAFETY: any bytes are values of a number, which every `WithDType` is.
        let (before, elements, after) = unsafe { bytes.align_to::<T>() };
        if T::DTYPE != self.dtype || !before.is_empty() || !after.is_empty() {
            return Err(Error::msg(format!("weights {} are not aligned", self.name)));
        }
        Ok(elements)
    }
}

impl CustomOp1 for MappedWeight {
    fn name(&self) -> &'static str {
        "mapped-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let calls = Calls::plan(layout, self.rows, self.columns)?;
        let y = match x {
            CpuStorage::F16(x) => CpuStorage::F16(calls.run(x, self.elements()?)?),
            CpuStorage::F32(x) => CpuStorage::F32(calls.run(x, self.elements()?)?),
            CpuStorage::F64(x) => CpuStorage::F64(calls.run(x, self.elements()?)?),
            // candle widens, multiplies and narrows.
            CpuStorage::BF16(x) => {
                let weight = self.elements::<half::bf16>()?.to_f32_vec();
                let y = calls.run(&x.to_f32_vec(), &weight)?;
                CpuStorage::BF16(Vec::from_f32_slice(&y))
            }
            _ => return Err(Error::UnsupportedDTypeForOp(self.dtype, "mapped-linear").bt()),
        };
        let mut dims = layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.rows;
        }
        Ok((y, dims.into()))
    }
}

/// The matrix multiplications that candle would do for `x W^T`: `count` times (m, k) by (k, n).
/// Other calls would round in another order.
#[derive(Debug, PartialEq, Eq)]
struct Calls {
    count: usize,
    m: usize,
    n: usize,
    k: usize,
    /// Elements from one matrix of `x` to the next, from one row to the next, from one column to
    /// the next, and before the first.
    skip: usize,
    row_stride: usize,
    column_stride: usize,
    start: usize,
}

impl Calls {
    fn plan(x: &Layout, rows: usize, columns: usize) -> Result<Self> {
        let (dims, strides) = (x.dims(), x.stride());
        let (&[ref batch @ .., m, k], &[ref batch_strides @ .., row_stride, column_stride]) =
            (dims, strides)
        else {
            return Err(Error::msg(format!(
                "a linear layer takes 2 to 4 dimensions, got {dims:?}"
            )));
        };
        let skip = match (batch, batch_strides) {
            ([], []) => m * k,
            ([_], &[stride]) => stride,
            (&[_, inner], &[outer, stride]) if outer == stride * inner => stride,
            ([1, _], &[_, stride]) => stride,
            ([_, 1], &[stride, _]) => stride,
            _ => {
                return Err(Error::msg(format!(
                    "dimensions {dims:?} with strides {strides:?}: call contiguous() first"
                )));
            }
        };
        if k != columns {
            return Err(Error::msg(format!(
                "input {dims:?} for weights ({rows}, {columns})"
            )));
        }
        let count = batch.iter().product();
        let (count, m) = if skip == m * k {
            (1, count * m)
        } else {
            (count, m)
        };
        Ok(Self {
            count,
            m,
            n: rows,
            k,
            skip,
            row_stride,
            column_stride,
            start: x.start_offset(),
        })
    }

    fn run<T: WithDType>(&self, x: &[T], weight: &[T]) -> Result<Vec<T>> {
        let &Self { count, m, n, k, .. } = self;
        let mut y = vec![T::from_f64(0.0); count * m * n];
        if y.is_empty() || k == 0 {
            return Ok(y);
        }
        let last = self.start
            + (count - 1) * self.skip
            + (m - 1) * self.row_stride
            + (k - 1) * self.column_stride;
        if x.len() <= last || weight.len() != n * k {
            return Err(Error::msg("an input shorter than its layout says"));
        }
        let threads = candle_core::utils::get_num_threads();
        let parallelism = match threads {
            0 | 1 => Parallelism::None,
            _ => Parallelism::Rayon(threads),
        };
        for (i, y) in y.chunks_exact_mut(m * n).enumerate() {
            let x = &x[self.start + i * self.skip..];
            let (zero, one) = (T::from_f64(0.0), T::from_f64(1.0));
            // SAFETY: `y` has m rows of n; `x` was found long enough for its last element, and
            // `weight` for n rows of k.
            unsafe {
                gemm(
                    m,
                    n,
                    k,
                    y.as_mut_ptr(),
                    1,
                    n as isize,
                    false,
                    x.as_ptr(),
                    self.column_stride as isize,
                    self.row_stride as isize,
                    weight.as_ptr(),
                    k as isize,
                    1,
                    zero,
                    one,
                    false,
                    false,
                    false,
                    parallelism,
                );
            }
        }
        Ok(y)
    }
}
