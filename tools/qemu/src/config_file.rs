//! Files of `-readconfig`, in which Incus describes a whole guest. They are changed line by line.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use memlane_qmp::options::{Properties, Value};

/// A file of `-readconfig` may have this many bytes; QEMU itself has no limit.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// A file of `-readconfig`.
#[derive(Clone, Debug)]
pub(crate) struct ConfigFile {
    /// These are all parts of the file in order. What stands before the first header is one without a group.
    pub sections: Vec<Section>,
}

/// A part of the file that begins with a header such as `[object "mem0"]`.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    /// The header names this kind of option.
    pub group: String,
    id: Option<String>,
    header: String,
    lines: Vec<Line>,
}

#[derive(Clone, Debug)]
struct Line {
    raw: String,
    /// This is the key and the value, if the line has them.
    pair: Option<(String, String)>,
}

impl ConfigFile {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// Fails if it is no regular file, since others can be read only once, and QEMU is to read it too. Fails also if it
    /// is no text or is too long.
    pub(crate) fn read(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        if !metadata.is_file() || metadata.len() > MAX_FILE_BYTES {
            return Err(io::Error::other(format!("it is no file of {MAX_FILE_BYTES} bytes at most")));
        }
        Ok(Self::parse(&fs::read_to_string(path)?))
    }

    /// Reads the text of a file, as `qemu_config_foreach()` of QEMU does.
    pub(crate) fn parse(text: &str) -> Self {
        let mut sections =
            vec![Section { group: String::new(), id: None, header: String::new(), lines: Vec::new() }];
        for raw in text.split_inclusive('\n') {
            if let Some((group, id)) = header(raw) {
                sections.push(Section { group, id, header: raw.to_owned(), lines: Vec::new() });
                continue;
            }
            let line = Line { raw: raw.to_owned(), pair: pair(raw) };
            sections.last_mut().expect("it begins with one").lines.push(line);
        }
        Self { sections }
    }
}

/// Reads `[group]` or `[group "id"]`.
fn header(line: &str) -> Option<(String, Option<String>)> {
    let inner = line.strip_prefix('[')?;
    if let Some((group, rest)) = inner.split_once(' ')
        && let Some((id, _)) = rest.trim_start().strip_prefix('"').and_then(|rest| rest.split_once('"'))
    {
        return Some((group.to_owned(), Some(id.to_owned())));
    }
    let (group, _) = inner.split_once(']')?;
    Some((group.to_owned(), None))
}

/// Reads `key = "value"`.
fn pair(line: &str) -> Option<(String, String)> {
    let line = line.trim_start();
    if line.starts_with('#') {
        return None;
    }
    let (key, rest) = line.split_once([' ', '\t'])?;
    let value = rest.trim_start().strip_prefix('=')?.trim_start().strip_prefix('"')?;
    let (value, _) = value.split_once('"')?;
    Some((key.to_owned(), value.to_owned()))
}

impl Section {
    fn find(&self, key: &str) -> Option<usize> {
        self.lines.iter().rposition(|line| line.pair.as_ref().is_some_and(|(found, _)| found == key))
    }
}

impl Properties for Section {
    fn get(&self, key: &str) -> Option<String> {
        let found = self.find(key).and_then(|at| self.lines[at].pair.as_ref());
        match found {
            Some((_, value)) => Some(value.clone()),
            None if key == "id" => self.id.clone(),
            None => None,
        }
    }

    fn set(&mut self, key: &str, value: Value<'_>) {
        // A value ends at a quotation mark, and nothing escapes one. What is set here is a word or a path without it.
        let (key, value) = (key.to_owned(), value.text().to_owned());
        let raw = format!("{key} = \"{value}\"\n");
        if let Some(at) = self.find(&key) {
            self.lines[at] = Line { raw, pair: Some((key, value)) };
            return;
        }
        let at = self.lines.iter().rposition(|line| line.pair.is_some()).map_or(0, |last| last + 1);
        let before = if at == 0 { &mut self.header } else { &mut self.lines[at - 1].raw };
        if !before.ends_with('\n') {
            before.push('\n');
        }
        self.lines.insert(at, Line { raw, pair: Some((key, value)) });
    }

    fn remove(&mut self, key: &str) {
        self.lines.retain(|line| line.pair.as_ref().is_none_or(|(found, _)| found != key));
    }
}

impl fmt::Display for ConfigFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for section in &self.sections {
            f.write_str(&section.header)?;
            section.lines.iter().try_for_each(|line| f.write_str(&line.raw))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INCUS: &str = "# Machine\n[machine]\naccel = \"kvm\"\ntype = \"q35\"\n\n# CPU\n[object \"mem0\"]\n\
        qom-type = \"memory-backend-memfd\"\n  size = \"1024M\"\nhost-nodes.0 = \"8\"\n\n# NUMA\n[numa]\n\
        memdev = \"mem0\"\ntype = \"node\"\nempty = \"\"";

    #[test]
    fn a_file_is_written_as_it_was_read() {
        for text in [INCUS, "", "x", "\n\n[a", "[a]\nb=\"c\"\r\n[d \"e\"]"] {
            assert_eq!(ConfigFile::parse(text).to_string(), text);
        }
    }

    #[test]
    fn sections_have_groups_ids_and_values() {
        let file = ConfigFile::parse(INCUS);
        let object = &file.sections[2];
        assert_eq!(object.get("id").unwrap(), "mem0");
        assert_eq!(object.get("size").unwrap(), "1024M");
        assert_eq!(object.get("share"), None);
        assert_eq!(file.sections[3].get("empty").unwrap(), "");
        assert_eq!(file.sections[1].get("type").unwrap(), "q35");
    }

    #[test]
    fn a_change_leaves_the_other_lines_alone() {
        let mut file = ConfigFile::parse(INCUS);
        let object = file.sections.iter_mut().find(|section| section.group == "object").unwrap();
        object.set("qom-type", Value::Text("memory-backend-file"));
        object.set("share", Value::Switch(true));
        object.remove("size");
        let expected = INCUS
            .replace("memfd", "file")
            .replace("  size = \"1024M\"\n", "")
            .replace("= \"8\"\n", "= \"8\"\nshare = \"on\"\n");
        assert_eq!(file.to_string(), expected);
    }

    #[test]
    fn a_line_is_added_behind_one_that_does_not_end() {
        let mut file = ConfigFile::parse("[object \"a\"]");
        file.sections[1].set("share", Value::Switch(true));
        assert_eq!(file.to_string(), "[object \"a\"]\nshare = \"on\"\n");
    }

    #[test]
    fn what_can_be_read_only_once_is_not_read() {
        assert!(ConfigFile::read(Path::new("/dev/null")).is_err());
        assert!(ConfigFile::read(Path::new("/nonexistent/file")).is_err());
    }
}
