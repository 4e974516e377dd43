//! The mounts that containerd's snapshotter asks for. The shim library's own function forks in a
//! process with threads, and wants to reap all children; this one does neither.

use std::path::Path;

use anyhow::{Context, Result};
use containerd_shim::protos::types::mount::Mount;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Mounts `wanted` at `target`.
pub(crate) fn mount_at(target: &Path, wanted: &Mount) -> Result<()> {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in &wanted.options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" | "defaults" => {}
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            other => data.push(other),
        }
    }
    let data = data.join(",");
    mount(
        Some(wanted.source.as_str()),
        target,
        Some(wanted.type_.as_str()),
        flags,
        Some(data.as_str()).filter(|data| !data.is_empty()),
    )
    .with_context(|| format!("mount {} at {}", wanted.type_, target.display()))?;
    if flags.contains(MsFlags::MS_BIND | MsFlags::MS_RDONLY) {
        // A bind takes no other flags at first.
        let again = flags | MsFlags::MS_REMOUNT;
        mount(None::<&str>, target, None::<&str>, again, None::<&str>)
            .with_context(|| format!("make {} read-only", target.display()))?;
    }
    Ok(())
}

/// Takes down whatever is mounted at `target`.
pub(crate) fn unmount(target: &Path) {
    while umount2(target, MntFlags::MNT_DETACH).is_ok() {}
}
