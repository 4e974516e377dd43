//! The command line.

use std::path::PathBuf;

use carlsbad_types::ByteSize;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// CXL memory as named, mappable, crash-safe namespaces.
///
/// PLACE is a device such as /dev/dax0.0, or a file: on hugetlbfs, tmpfs, or any file system.
///
/// Exit codes: 1 failed, 2 bad usage, 3 no such thing, 4 not allowed, 5 no room, 6 unavailable,
/// 7 damaged.
#[derive(Debug, Parser)]
#[command(name = "directcxl", version, max_term_width = 100)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Print results as JSON: sizes in bytes; errors as {"error", "kind"} on standard error.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Which of the hosts that share the memory this one is.
    #[arg(long, global = true, default_value_t = 0, value_name = "NUMBER")]
    pub(crate) host: u16,
    /// The epoch to write with: a later one than before takes over from another host.
    #[arg(long, global = true, value_name = "NUMBER")]
    pub(crate) epoch: Option<u64>,
    /// Nothing keeps the hosts' caches coherent: write lines back, and drop them.
    #[arg(long, global = true)]
    pub(crate) software_coherence: bool,
    /// The root of sysfs.
    #[arg(long, global = true, default_value = "/sys", value_name = "DIRECTORY")]
    pub(crate) sysfs: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show CXL devices, windows, regions, and DAX devices.
    Scan,
    /// Say how a region would be made, and everything that would be written.
    Plan(Request),
    /// Make a region, and bind device_dax to it.
    Apply(Request),
    /// Take a region away.
    Destroy {
        /// Its name.
        region: String,
    },
    /// Make a pool.
    Format(Format),
    /// Make a namespace.
    Create(Create),
    /// List the namespaces of a pool.
    List {
        /// The pool.
        place: PathBuf,
    },
    /// Look at everything a pool has.
    Check {
        /// The pool.
        place: PathBuf,
        /// Write what is damaged from its copy.
        #[arg(long)]
        repair: bool,
    },
    /// Give a namespace another length.
    Resize(Create),
    /// Remove a namespace. Its memory is used again when nobody is attached any more.
    Remove {
        /// The pool.
        place: PathBuf,
        /// Its name.
        name: String,
    },
    /// Declare a host dead, so that its leases do not count any more.
    Evict {
        /// The pool.
        place: PathBuf,
        /// The host that is dead.
        dead: u16,
    },
}

impl Command {
    /// Whether it is more than looking.
    pub(crate) fn changes_something(&self) -> bool {
        !matches!(
            self,
            Self::Scan | Self::Plan(_) | Self::List { .. } | Self::Check { repair: false, .. }
        )
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Mode {
    /// Volatile.
    Ram,
    /// Persistent.
    Pmem,
}

#[derive(Debug, Args)]
pub(crate) struct Request {
    /// Volatile or persistent.
    #[arg(long, default_value = "ram")]
    pub(crate) mode: Mode,
    /// A memory device, such as mem0; several in the order of interleaving.
    #[arg(long = "memdev", value_name = "NAME")]
    pub(crate) memdevs: Vec<String>,
    /// How many devices, where they are not named.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) ways: Option<u32>,
    /// Bytes that go to one device before the next.
    #[arg(long, value_name = "BYTES")]
    pub(crate) granularity: Option<u64>,
    /// Size of the region; as much as there is without it.
    #[arg(long)]
    pub(crate) size: Option<ByteSize>,
    /// The window, such as decoder0.0.
    #[arg(long, value_name = "NAME")]
    pub(crate) window: Option<String>,
    /// Of a persistent region that was made before: its content is found again by it.
    #[arg(long)]
    pub(crate) uuid: Option<uuid::Uuid>,
}

#[derive(Debug, Args)]
pub(crate) struct Format {
    /// A device, or a file.
    pub(crate) place: PathBuf,
    /// Make a file of this size.
    #[arg(long)]
    pub(crate) size: Option<ByteSize>,
    /// Hosts that may have the pool open.
    #[arg(long, default_value_t = 1, value_name = "NUMBER")]
    pub(crate) hosts: u16,
    /// Entries of a log arena; a pool holds three quarters as many namespaces.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) entries: Option<u64>,
    /// Lose what is there.
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// The pool.
    pub(crate) place: PathBuf,
    /// The namespace's name.
    pub(crate) name: String,
    /// Its size, rounded up to 2 MiB.
    pub(crate) size: ByteSize,
}
