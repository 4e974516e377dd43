//! Each crate builds with every set of features that a user is likely to choose.

use anyhow::Result;

use crate::shell;
use crate::workspace::Package;

pub(crate) fn check(ten: &[&Package]) -> Result<()> {
    for package in ten {
        let features = package.ci_features();
        let mut sets = vec![vec!["--no-default-features".to_owned()], Vec::new()];
        for feature in features {
            sets.push(vec![
                "--no-default-features".to_owned(),
                "--features".to_owned(),
                feature.clone(),
            ]);
        }
        if features.len() > 1 {
            sets.push(vec!["--features".to_owned(), features.join(",")]);
        }
        for set in sets {
            shell::run(
                shell::cargo()
                    .args(["check", "--quiet", "--lib", "--bins", "-p", &package.name])
                    .args(set),
            )?;
        }
    }
    Ok(())
}
