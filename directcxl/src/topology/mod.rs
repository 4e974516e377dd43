//! CXL devices of this machine, and how their memory becomes something that can be mapped.
//!
//! [`scan`] reads what the kernel's drivers know, below `/sys/bus/cxl` and `/sys/bus/dax`.
//! [`plan`] decides, from that alone, which devices a region interleaves over and how, and says why
//! where it cannot. [`apply`] makes the region by sysfs and binds a driver to it. Where a step fails
//! the error names the step, the reason that the kernel's state shows, and what to do.

mod apply;
mod plan;
mod scan;

pub use apply::{Applied, apply, destroy};
pub use plan::{Mode, Plan, Request, Write, plan};
pub use scan::{DaxDevice, EndpointDecoder, Memdev, Region, RootDecoder, Topology, scan};
