//! What the documents say of the sources is there: files and folders in all pages, and names in the one about the
//! architecture.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::reader::{Kind, Page, pages, root};

/// The page that leads through the sources.
const GUIDE: &str = "docs/architecture.md";

#[test]
fn files_and_folders_are_there() {
    let top = top_folders();
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for page in pages() {
        for (line, base, span) in placed_spans(&page) {
            let of_sources =
                page.name == GUIDE || span.split_once('/').is_some_and(|(first, _)| top.contains(first));
            if !of_sources || !is_path(span) {
                continue;
            }
            seen += 1;
            let is_there = |path: PathBuf| path.exists() && (path.is_dir() || !span.ends_with('/'));
            if !is_there(base.join(span)) && !is_there(root().join(span)) {
                wrong.push(format!("{}:{line}: {span}", page.name));
            }
        }
    }
    assert_eq!(wrong.join("\n"), "");
    assert!(seen > 100, "{seen} paths");
}

#[test]
fn names_in_the_guide_are_those_of_the_code() {
    let known = declared();
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for page in pages().iter().filter(|page| page.name == GUIDE) {
        for (line, span) in page.spans() {
            if is_path(span) || !is_name(span) {
                continue;
            }
            seen += 1;
            let is_known = |part: &str| part.starts_with("memlane") || known.contains(part);
            if !span.split("::").all(is_known) {
                wrong.push(format!("{}:{line}: {span}", page.name));
            }
        }
    }
    assert_eq!(wrong.join("\n"), "");
    assert!(seen > 100, "{seen} names");
}

/// The folders in the root of the sources.
fn top_folders() -> BTreeSet<String> {
    let entries =
        fs::read_dir(root()).expect("the root of the sources").map(|entry| entry.expect("an entry"));
    let names = entries.filter(|entry| entry.path().is_dir()).map(|entry| entry.file_name());
    let names = names.filter_map(|name| name.into_string().ok());
    names.filter(|name| !name.starts_with('.') && name != "target").collect()
}

/// Pieces of code with their lines, and the folder that paths below their heading are relative to: the sources of the
/// crate that the heading names, or the root.
fn placed_spans(page: &Page) -> Vec<(usize, PathBuf, &str)> {
    let headings =
        page.lines().into_iter().filter(|(_, text, kind)| *kind == Kind::Prose && text.starts_with('#'));
    let bases: Vec<(usize, PathBuf)> = headings
        .map(|(line, text, _)| (line, text.split('`').nth(1).map_or(root().to_owned(), crate_sources)))
        .collect();
    let base = |line: usize| bases.iter().rev().find(|(of_heading, _)| *of_heading < line);
    let spans = page.spans().into_iter();
    spans
        .map(|(line, span)| (line, base(line).map_or(root().to_owned(), |(_, base)| base.clone()), span))
        .collect()
}

fn crate_sources(folder: &str) -> PathBuf {
    root().join(folder).join("src")
}

fn is_path(span: &str) -> bool {
    let of_path = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/');
    let relative = !span.starts_with(['/', '.', '-']);
    let ends = [".rs", ".toml", ".json", ".md"];
    relative
        && span.chars().all(of_path)
        && (span.contains('/') || ends.iter().any(|end| span.ends_with(end)))
}

/// Whether it is a name of this project's: constants of the kernel, in capitals, are not.
fn is_name(span: &str) -> bool {
    let of_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ':' | '-');
    let capitals =
        span.chars().all(|c| c.is_ascii_uppercase() || matches!(c, '_' | '-')) && span != "VERSIONS";
    !capitals && span != "unsafe" && span != "ioctl" && span.chars().all(of_name)
}

/// What the code declares: types, functions, modules, constants, variants and fields, and words that it writes.
fn declared() -> BTreeSet<String> {
    let mut declared = BTreeSet::new();
    for folder in top_folders() {
        for file in sources(&root().join(folder)) {
            let text =
                fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            text.lines().for_each(|line| declare(line.trim(), &mut declared));
        }
    }
    declared
}

fn declare(line: &str, declared: &mut BTreeSet<String>) {
    const KEYWORDS: [&str; 8] = ["struct", "enum", "trait", "type", "fn", "const", "static", "mod"];
    if line.starts_with("//") {
        return;
    }
    let words: Vec<&str> = line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').collect();
    let after_keyword = words.windows(2).filter(|pair| KEYWORDS.contains(&pair[0])).map(|pair| pair[1]);
    declared.extend(after_keyword.map(str::to_owned));
    declared.extend(line.split('"').skip(1).step_by(2).map(str::to_owned));
    let item = line.strip_prefix("pub(crate) ").or(line.strip_prefix("pub ")).unwrap_or(line);
    let end = item.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(item.len());
    let (name, rest) = item.split_at(end);
    let variant = name.starts_with(|c: char| c.is_ascii_uppercase())
        && (rest.is_empty() || [",", " {", "(", " ="].iter().any(|after| rest.starts_with(after)));
    if variant || rest.starts_with(": ") {
        declared.insert(name.to_owned());
    }
}

/// All files of Rust below a folder.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let paths = entries.map(|entry| entry.expect("an entry of a folder").path());
    let (folders, files): (Vec<_>, Vec<_>) = paths.partition(|path| path.is_dir());
    let of_rust =
        files.into_iter().filter(|file| file.extension().is_some_and(|extension| extension == "rs"));
    of_rust.chain(folders.iter().flat_map(|folder| sources(folder))).collect()
}
