//! What the documents say of commands, metrics, the configuration and other files is there.

mod places;
mod reader;

use std::collections::BTreeSet;
use std::path::Path;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use memlane_guest::qemu::definition::{Definition, DefinitionError};
use memlane_perf::scenario::ScenarioCommand;
use memlaned::config::Config;
use memlaned::metrics;

use super::XtaskArguments;
use reader::{Command, Kind, Page, commands, pages, root};

/// The arguments of memlane-perf, as far as documents give them.
fn bench() -> clap::Command {
    let report = clap::Arg::new("report").long("report").global(true);
    let json = clap::Arg::new("json").long("json").global(true).action(clap::ArgAction::SetTrue);
    ScenarioCommand::augment_subcommands(clap::Command::new("bench").args([report, json]))
}

/// Why a command is not understood.
fn misunderstood(command: &Command, parsed: clap::error::Result<clap::ArgMatches>) -> Option<String> {
    let error = parsed.err()?;
    let fine = match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => true,
        ErrorKind::MissingRequiredArgument => !command.whole,
        _ => false,
    };
    (!fine).then(|| format!("{}: {}\n{error}", command.place, command.words.join(" ")))
}

#[test]
fn commands_of_the_project_are_understood() {
    let commands = commands("cargo xtask");
    let wrong = commands.iter().filter_map(|command| {
        // Without `cargo`: `xtask` stands for the program.
        let words = &command.words[1..];
        let of_bench = words[1] == "bench" && words.get(2).is_some_and(|word| !word.starts_with('-'));
        let parsed = match of_bench {
            true => bench().try_get_matches_from(&words[1..]),
            false => XtaskArguments::command().try_get_matches_from(words),
        };
        misunderstood(command, parsed)
    });
    assert_eq!(wrong.collect::<Vec<_>>().join("\n"), "");
    let given = |what: &str| commands.iter().any(|command| command.whole && command.words.join(" ") == what);
    assert!(given("cargo xtask demo") && given("cargo xtask test") && commands.len() > 10, "{commands:?}");
    assert!(XtaskArguments::try_parse_from(["xtask", "demonstrate"]).is_err());
}

/// The workspace's manifest, which names all crates.
const WORKSPACE: &str = include_str!("../../../../Cargo.toml");

#[test]
fn metrics_are_there() {
    let mut there: BTreeSet<String> = metrics::kinds().map(|(name, _)| name.to_owned()).collect();
    for (name, _) in metrics::kinds().filter(|(_, kind)| *kind == "histogram") {
        there.extend(["_bucket", "_sum", "_count"].map(|end| format!("{name}{end}")));
    }
    let pages = pages();
    let named: Vec<(&str, &str)> =
        pages.iter().flat_map(|page| metrics_in(&page.text).map(|name| (page.name.as_str(), name))).collect();
    // Crates are named too, and what all metrics begin with.
    let crates: Vec<String> = WORKSPACE
        .lines()
        .filter_map(|line| line.split_once(" = "))
        .map(|(name, _)| name.replace('-', "_"))
        .collect();
    let known =
        |name: &str| there.contains(name) || name == "memlane_" || crates.iter().any(|known| known == name);
    let unknown: Vec<_> = named.iter().filter(|(_, name)| !known(name)).collect();
    assert!(unknown.is_empty() && named.len() > 10, "{unknown:?} are none of {there:?}");
}

/// Names of metrics in a text. What is followed by `::` or `=` is a crate, and `lib` begins the name of a library.
fn metrics_in(text: &str) -> impl Iterator<Item = &str> {
    text.match_indices("memlane_").filter_map(|(start, _)| {
        let rest = &text[start..];
        let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap_or(rest.len());
        let of_crate = rest[end..].starts_with("::") || rest[end..].starts_with('=');
        let of_library = text[..start].ends_with("lib");
        (!of_crate && !of_library).then_some(&rest[..end])
    })
}

#[test]
fn configurations_and_guest_files_are_read() {
    let mut read = 0;
    for page in pages() {
        for (line, text) in toml(&page) {
            let place = format!("{}:{line}", page.name);
            // Users and groups need not be there on the machine of a test.
            let text = ["libvirt-qemu", "alice", "@memlane", "@memlane-viewers"]
                .iter()
                .fold(text, |text, name| text.replace(&format!("\"{name}\""), "\"root\""));
            let of_guest = text.lines().any(|line| line.starts_with("arguments = "));
            let wrong = match of_guest {
                true => Definition::parse(Path::new(&place), &text).map(drop).map_err(as_text),
                false => Config::parse(Path::new(&place), &text).map(drop).map_err(|e| e.to_string()),
            };
            assert_eq!(wrong, Ok(()), "line {line} of {}", page.name);
            read += 1;
        }
    }
    assert!(read > 3, "{read} blocks of TOML");
}

fn as_text(error: DefinitionError) -> String {
    error.to_string()
}

/// Blocks of TOML with the lines where they begin, but for those of manifests of cargo.
fn toml(page: &Page) -> Vec<(usize, String)> {
    let (mut blocks, mut open) = (Vec::new(), false);
    for (number, line, kind) in page.lines() {
        match kind {
            Kind::Fence => {
                open = line.trim() == "```toml";
                if open {
                    blocks.push((number, String::new()));
                }
            }
            _ if open => {
                let (_, block) = blocks.last_mut().expect("a block that is open");
                block.push_str(line);
                block.push('\n');
            }
            _ => {}
        }
    }
    blocks.retain(|(_, block)| !block.starts_with("[dependencies]"));
    blocks
}

#[test]
fn keys_of_the_configuration_are_there() {
    let mut seen = 0;
    for page in pages() {
        for (line, span) in page.spans() {
            let Some((table, key)) = span.split_once('.') else { continue };
            let is_key = key.chars().all(|c| c.is_ascii_lowercase() || c == '_');
            // attach.sock and attach.rs are files.
            if !is_key
                || matches!(key, "sock" | "rs")
                || !matches!(table, "limits" | "attach" | "guests" | "keys")
            {
                continue;
            }
            let text = format!("[{table}]\n{key} = []\n");
            let wrong = Config::parse(Path::new("documents"), &text).err().map(|error| error.to_string());
            let unknown = wrong.filter(|wrong| wrong.contains("unknown key"));
            assert_eq!(unknown, None, "{}:{line}", page.name);
            seen += 1;
        }
    }
    assert!(seen > 5, "{seen} keys");
}

#[test]
fn links_lead_somewhere() {
    let mut wrong = Vec::new();
    for page in pages() {
        for (line, link) in links(&page) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let of_page = root().join(&page.name);
            let target = match file {
                "" => of_page,
                file => of_page.parent().expect("a file in a folder").join(file),
            };
            let there = target.exists() && (heading.is_empty() || headings(&target).contains(heading));
            if !there {
                wrong.push(format!("{}:{line}: {link}", page.name));
            }
        }
    }
    assert_eq!(wrong.join("\n"), "");
}

/// Links to other files, and to headings.
fn links(page: &Page) -> Vec<(usize, &str)> {
    let mut links = Vec::new();
    for (number, line, _) in page.lines().into_iter().filter(|(_, _, kind)| *kind == Kind::Prose) {
        let targets = line.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
        links.extend(targets.map(|(target, _)| (number, target)).filter(|(_, target)| !target.contains(':')));
    }
    links
}

/// The headings of a page, as links name them.
fn headings(file: &Path) -> BTreeSet<String> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let page = Page { name: String::new(), text };
    let lines =
        page.lines().into_iter().filter(|(_, line, kind)| *kind == Kind::Prose && line.starts_with('#'));
    lines
        .map(|(_, line, _)| {
            let title = line.trim_start_matches('#').trim().to_lowercase();
            let kept = title.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}
