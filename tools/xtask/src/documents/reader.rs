//! The pages of the documents, and the commands in them. The tests of `memlanectl` include this file as well.

use std::fs;
use std::path::Path;

/// One page: a Markdown file of the sources.
pub(super) struct Page {
    /// Its file, from the root of the sources.
    pub name: String,
    /// What it says.
    pub text: String,
}

/// A command in a page.
#[derive(Debug, PartialEq)]
pub(super) struct Command {
    /// Page and line.
    pub place: String,
    /// The program and its arguments.
    pub words: Vec<String>,
    /// False within a sentence, where it may be only the beginning of a command.
    pub whole: bool,
}

/// The root of the sources, from the folder of either program.
pub(super) fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// All pages: those in the root of the sources, and those in `docs/`.
pub(super) fn pages() -> Vec<Page> {
    let folders = [root().to_owned(), root().join("docs")];
    let files = folders.iter().flat_map(|folder| fs::read_dir(folder).expect("a folder of the sources"));
    let files = files.map(|entry| entry.expect("an entry of a folder").path());
    let pages = files.filter(|file| file.extension().is_some_and(|extension| extension == "md"));
    pages
        .map(|file| {
            let name = file.strip_prefix(root()).expect("a file below the root").display().to_string();
            let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{name}: {error}"));
            Page { name, text }
        })
        .collect()
}

/// All commands of `program`, such as `cargo xtask`, in all pages.
pub(super) fn commands(program: &str) -> Vec<Command> {
    pages().iter().flat_map(|page| page.commands(program)).collect()
}

impl Page {
    /// The commands of `program`: in blocks of code, without comments, and in sentences.
    pub(super) fn commands(&self, program: &str) -> Vec<Command> {
        let in_blocks = self.code().into_iter().flat_map(|(line, code)| {
            let code = code.split(" #").next().unwrap_or_default();
            let parts = code.split([';', '|', '>', '&']).map(str::to_owned).collect::<Vec<_>>();
            parts.into_iter().map(move |part| (line, part, true))
        });
        let in_sentences = self.spans().into_iter().map(|(line, span)| (line, span.to_owned(), false));
        let programs: Vec<&str> = program.split(' ').collect();
        in_blocks
            .chain(in_sentences)
            .filter_map(|(line, text, whole)| {
                let words = text.split_whitespace().skip_while(|word| matches!(*word, "$" | "sudo"));
                let words: Vec<String> =
                    words.map(|word| word.trim_matches(['\'', '"']).to_owned()).collect();
                let place = format!("{}:{line}", self.name);
                words.iter().zip(&programs).all(|(word, program)| word == program).then_some(())?;
                (words.len() > programs.len()).then_some(Command { place, words, whole })
            })
            .collect()
    }

    /// The lines of blocks of code with their numbers. A line that goes on in the next one is one with that.
    pub(super) fn code(&self) -> Vec<(usize, String)> {
        let mut code: Vec<(usize, String)> = Vec::new();
        let mut goes_on = false;
        for (number, line, kind) in self.lines() {
            if kind != Kind::Code {
                goes_on = false;
                continue;
            }
            let part = line.trim().strip_suffix('\\');
            let text = part.unwrap_or(line.trim());
            match code.last_mut() {
                Some((_, before)) if goes_on => before.push_str(text),
                _ => code.push((number, text.to_owned())),
            }
            goes_on = part.is_some();
        }
        code
    }

    /// The pieces of code in sentences and tables, with their lines.
    pub(super) fn spans(&self) -> Vec<(usize, &str)> {
        let mut spans = Vec::new();
        let prose = self.lines().into_iter().filter(|(_, _, kind)| *kind == Kind::Prose);
        for (number, line, _) in prose {
            spans.extend(line.split('`').skip(1).step_by(2).map(|span| (number, span)));
        }
        spans
    }

    /// Lines with their numbers, and whether they are code.
    pub(super) fn lines(&self) -> Vec<(usize, &str, Kind)> {
        let mut fenced = false;
        let kind = |line: &str| {
            if line.trim_start().starts_with("```") {
                fenced = !fenced;
                return Kind::Fence;
            }
            if fenced || line.starts_with("    ") { Kind::Code } else { Kind::Prose }
        };
        let lines = self.text.lines().scan(kind, |kind, line| Some((line, kind(line)))).enumerate();
        lines.map(|(index, (line, kind))| (index + 1, line, kind)).collect()
    }
}

/// What a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Sentences, tables and headings.
    Prose,
    /// A line of a block of code, fenced or indented by four spaces.
    Code,
    /// The beginning or the end of a fenced block.
    Fence,
}
