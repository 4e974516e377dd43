//! What candle models load their weights through.

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

use super::report::CopyReason;
use super::shared_tensors::SharedTensors;

impl SharedTensors {
    /// For unmodified candle models: `BertModel::load(tensors.var_builder(DType::F32), &config)`.
    ///
    /// Tensors of another type than `dtype` are converted, as candle's own loader does; a
    /// conversion is a copy, and stands in the [report](Self::report).
    pub fn var_builder(&self, dtype: DType) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), dtype, Device::Cpu)
    }
}

impl SimpleBackend for SharedTensors {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, on: &Device) -> Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, on)?;
        if tensor.shape() == &shape {
            return Ok(tensor);
        }
        Err(Error::UnexpectedShape {
            msg: format!("shape mismatch for {name}"),
            expected: shape,
            got: tensor.shape().clone(),
        }
        .bt())
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let stored = match self.lookup(name) {
            Some(Ok(tensor)) => tensor,
            Some(Err(element)) => {
                return Err(Error::msg(format!(
                    "tensor {name} is stored as {element}, which candle has no type for: read its \
                     bytes with SharedModel::tensor"
                )));
            }
            None => {
                return Err(Error::CannotFindTensor {
                    path: name.to_owned(),
                }
                .bt());
            }
        };
        let mut tensor = stored.clone();
        if !tensor.device().same_device(device) {
            tensor = tensor.to_device(device)?;
            self.add_copy(name, &tensor, CopyReason::OtherDevice);
        }
        if tensor.dtype() != dtype {
            tensor = tensor.to_dtype(dtype)?;
            self.add_copy(name, &tensor, CopyReason::Converted { to: dtype });
        }
        Ok(tensor)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.lookup(name).is_some()
    }
}
