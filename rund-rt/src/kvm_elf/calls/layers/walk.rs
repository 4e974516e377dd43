//! Walking a path, one component at a time, in both layers.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::stat::{FileStat, SFlag, fstat};

use super::whiteout::{HIDDEN, OPAQUE, hidden_name};
use super::{Found, Layers, MOST_PATH, Place, Presence, join, kind, stat_in};

/// The most symbolic links on one way, as on Linux.
const MOST_LINKS: usize = 40;

impl Layers {
    /// Walks `path` (absolute). A symbolic link at its end is followed where `follow` says so.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, ELOOP, ENAMETOOLONG: as Linux says for what lies before the last component.
    pub fn walk(&mut self, path: &[u8], follow: bool) -> Result<Place, Errno> {
        if path.len() > MOST_PATH {
            return Err(Errno::ENAMETOOLONG);
        }
        let root = Presence {
            upper: self.upper().is_some(),
            lower: self.lower.is_some(),
        };
        let mut rest: Vec<Vec<u8>> = components(path);
        // A path that ends in a slash names a directory.
        let directory_asked = path.ends_with(b"/") || path.ends_with(b"/.");
        // Where we are: the components, and what each of them is.
        let mut at: Vec<(Vec<u8>, Found)> = Vec::new();
        let mut links = 0;
        let root_found = Found {
            stat: self.root_stat()?,
            presence: root,
        };
        while let Some(name) = rest.pop() {
            if name == b".." {
                at.pop();
                continue;
            }
            let here = at.last().map_or(root_found, |(_, found)| *found);
            if !here.is_directory() {
                return Err(Errno::ENOTDIR);
            }
            if name.len() > 255 {
                return Err(Errno::ENAMETOOLONG);
            }
            if name.starts_with(HIDDEN) {
                return Err(Errno::ENOENT);
            }
            let parent: &[u8] = at.last().map_or(b"/", |(path, _)| path);
            let path = join(parent, &name);
            let Some(found) = self.look(&path, here.presence) else {
                if rest.is_empty() {
                    return Ok(Place {
                        path,
                        found: None,
                        parent: here.presence,
                    });
                }
                return Err(Errno::ENOENT);
            };
            if found.is_link() && (follow || !rest.is_empty() || directory_asked) {
                links += 1;
                if links > MOST_LINKS {
                    return Err(Errno::ELOOP);
                }
                let target = self.read_link_at(&path, found.presence)?;
                if target.starts_with(b"/") {
                    at.clear();
                }
                rest.extend(components(&target));
                if rest.len() > MOST_PATH {
                    return Err(Errno::ENAMETOOLONG);
                }
                continue;
            }
            at.push((path, found));
        }
        let parent = match at.len() {
            0 | 1 => root,
            n => at[n - 2].1.presence,
        };
        let (path, found) = at.pop().unwrap_or((b"/".to_vec(), root_found));
        if directory_asked && !found.is_directory() {
            return Err(Errno::ENOTDIR);
        }
        Ok(Place {
            path,
            found: Some(found),
            parent,
        })
    }

    pub(super) fn root_stat(&mut self) -> Result<FileStat, Errno> {
        if let Some(lower) = self.lower() {
            return fstat(lower);
        }
        if let Some(upper) = self.upper() {
            return fstat(upper);
        }
        match &self.upper {
            Some(upper) => fstat(upper.base.as_fd()),
            None => Err(Errno::ENOENT),
        }
    }

    /// What is at `path`, whose parent is in the layers `parent`.
    pub(super) fn look(&mut self, path: &[u8], parent: Presence) -> Option<Found> {
        let mut lower_visible = parent.lower;
        if parent.upper
            && let Some(upper) = self.upper()
        {
            let hidden = lower_visible && stat_in(upper, &hidden_name(path)).is_some();
            lower_visible &= !hidden;
            if let Some(stat) = stat_in(upper, path) {
                let mut found = Found {
                    stat,
                    presence: Presence {
                        upper: true,
                        lower: false,
                    },
                };
                if found.is_directory()
                    && lower_visible
                    && stat_in(upper, &join(path, OPAQUE)).is_none()
                {
                    let below = self.lower().and_then(|lower| stat_in(lower, path));
                    found.presence.lower = below.is_some_and(|s| kind(&s) == SFlag::S_IFDIR);
                }
                return Some(found);
            }
        }
        if !lower_visible {
            return None;
        }
        let stat = stat_in(self.lower()?, path)?;
        Some(Found {
            stat,
            presence: Presence {
                upper: false,
                lower: true,
            },
        })
    }
}

/// The names between slashes, last first.
pub(super) fn components(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
        .rev()
        .map(<[u8]>::to_vec)
        .collect()
}
