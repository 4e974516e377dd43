//! The figures as a table in the crate's README, between two marks.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use carlsbad_kit::sample::median;

use super::judge::{Judged, number};

const BEGIN: &str = "<!-- figures: written by `cargo xtask figures` -->";
const END: &str = "<!-- end of figures -->";

/// Writes the table into `readme`.
pub(crate) fn render(readme: &Path, name: &str, judged: &[Judged]) -> Result<()> {
    let text =
        fs::read_to_string(readme).with_context(|| format!("cannot read {}", readme.display()))?;
    let new = between_marks(&text, &table(name, judged))
        .with_context(|| format!("{}: no lines `{BEGIN}` and `{END}`", readme.display()))?;
    if new != text {
        fs::write(readme, new).with_context(|| format!("cannot write {}", readme.display()))?;
        eprintln!("rendered {}", readme.display());
    }
    Ok(())
}

/// Writes a crate's first figure into its line of the workspace's README.
pub(crate) fn render_headline(readme: &Path, name: &str, judged: &[Judged]) -> Result<()> {
    let Some(headline) = judged.first() else {
        return Ok(());
    };
    let words = match (headline.ratio, &headline.baseline, headline.value) {
        (Some(ratio), Some(rival), _) => {
            format!("{}: {}x {}", headline.what, number(ratio), rival.name)
        }
        (_, _, Some(value)) => {
            format!("{}: {} {}", headline.what, number(value), headline.unit)
        }
        _ => headline.what.clone() + ": not measured",
    };
    let text =
        fs::read_to_string(readme).with_context(|| format!("cannot read {}", readme.display()))?;
    let begin = format!("<!-- headline {name} -->");
    let new = replace_between(&text, &begin, "<!-- end -->", &cell(&words))
        .with_context(|| format!("{}: no `{begin}`", readme.display()))?;
    if new != text {
        fs::write(readme, new).with_context(|| format!("cannot write {}", readme.display()))?;
    }
    Ok(())
}

fn between_marks(text: &str, table: &str) -> Option<String> {
    replace_between(text, BEGIN, END, &format!("\n{table}"))
}

fn replace_between(text: &str, begin: &str, end: &str, new: &str) -> Option<String> {
    let from = text.find(begin)? + begin.len();
    let to = from + text[from..].find(end)?;
    Some(format!("{}{new}{}", &text[..from], &text[to..]))
}

fn table(name: &str, judged: &[Judged]) -> String {
    let mut out = String::from(
        "| | what | ours | rival | ratio | least | goal | |\n\
         |---|---|--:|---|--:|---|---|---|\n",
    );
    for figure in judged {
        let number_in_spec = figure.id.strip_prefix(name).unwrap_or(&figure.id);
        let mut what = figure.what.clone();
        if let Some(note) = &figure.note {
            let _infallible = write!(what, " ({note})");
        }
        let ours = figure.value.map_or_else(
            || "not measured".to_owned(),
            |value| format!("{} {}", number(value), figure.unit),
        );
        let rival = match (&figure.baseline, &figure.skipped) {
            (_, Some(why)) => why.clone(),
            (Some(baseline), None) => format!(
                "{}: {} {}",
                baseline.name,
                number(median(&baseline.samples)),
                figure.unit
            ),
            (None, None) => String::new(),
        };
        let ratio = figure
            .ratio
            .map_or_else(String::new, |ratio| format!("{}x", number(ratio)));
        let _infallible = writeln!(
            out,
            "| {} | {} | {ours} | {} | {ratio} | {} | {} | {} |",
            number_in_spec.trim_start_matches('/'),
            cell(&what),
            cell(&rival),
            figure.least,
            figure.goal,
            figure.verdict(),
        );
    }
    let machines: BTreeSet<_> = judged.iter().map(|j| j.run.machine.as_str()).collect();
    let commits: BTreeSet<_> = judged.iter().map(|j| j.run.commit.as_str()).collect();
    let load = judged.iter().map(|j| j.run.load).fold(0.0, f64::max);
    let steal = judged.iter().map(|j| j.run.steal).fold(0.0, f64::max);
    let list = |set: BTreeSet<&str>| set.into_iter().collect::<Vec<_>>().join("; ");
    let _infallible = writeln!(
        out,
        "\nMedians, ours and the rival's taken in turn in the same run, by \
         `cargo xtask figures {name}`\nat commit {}.\n{}.\n\
         Of the processors' time others took at most {:.0}% just before, the hypervisor {:.0}%.",
        list(commits),
        list(machines),
        load * 100.0,
        steal * 100.0,
    );
    out
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::{BEGIN, END, between_marks};

    #[test]
    fn only_what_stands_between_the_marks_is_replaced() {
        let readme = format!("# x\n{BEGIN}\nold\n{END}\nrest\n");
        let new = between_marks(&readme, "| new |\n").unwrap();
        assert_eq!(new, format!("# x\n{BEGIN}\n| new |\n{END}\nrest\n"));
        assert_eq!(between_marks(&new, "| new |\n").unwrap(), new);
        assert!(between_marks("# x\n", "t").is_none());
    }
}
