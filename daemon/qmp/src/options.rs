//! The values of QEMU's options, as `key=value` pairs or as JSON. They are changed without touching what is not
//! understood.

use std::fmt;

use serde_json::{Map, Value as Json};

/// A description of an object or of a setting of QEMU, in whatever syntax it was given.
pub trait Properties {
    /// Returns the value of a property as text. Of several values the last one counts, as it does for QEMU.
    fn get(&self, key: &str) -> Option<String>;
    /// Gives a property this value alone.
    fn set(&mut self, key: &str, value: Value<'_>);
    /// Takes a property out.
    fn remove(&mut self, key: &str);

    /// Tells whether a switch is on. A switch that is not given is off.
    fn is_on(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| matches!(value.as_str(), "on" | "yes" | "true" | "y"))
    }
}

/// A value that a property is given. JSON tells the kinds apart.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    /// The value is a text.
    Text(&'a str),
    /// The value is on or off.
    Switch(bool),
}

impl Value<'_> {
    /// Returns the value as QEMU reads it where all values are texts.
    pub fn text(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Switch(true) => "on",
            Self::Switch(false) => "off",
        }
    }
}

/// The value of an option, such as `memory-backend-ram,id=ram0,size=2G`.
#[derive(Clone, Debug)]
pub struct Options(Vec<Part>);

/// A part of an option's value that stands between commas.
#[derive(Clone, Debug)]
struct Part {
    /// The part names this property, perhaps because it is the first one and has no name.
    key: String,
    /// The property has this value.
    value: String,
    /// The part was given in this way.
    raw: String,
    /// If this is true, the key is not written.
    implied: bool,
}

impl Options {
    /// Reads the value of an option, as `qemu_opts_parse()` of QEMU does. `first` is the key of a first part that names
    /// none.
    pub fn parse(text: &str, first: &str) -> Self {
        let (mut parts, mut rest) = (Vec::new(), text);
        while !rest.is_empty() {
            let name = rest.find(['=', ',']).unwrap_or(rest.len());
            let (key, value, implied, length) = if rest[name..].starts_with('=') {
                let (value, length) = until_comma(&rest[name + 1..]);
                (rest[..name].to_owned(), value, false, name + 1 + length)
            } else if parts.is_empty() {
                let (value, length) = until_comma(rest);
                (first.to_owned(), value, true, length)
            } else {
                // An old way to write a switch.
                let (key, value) = match rest[..name].strip_prefix("no") {
                    Some(key) => (key, "off"),
                    None => (&rest[..name], "on"),
                };
                (key.to_owned(), value.to_owned(), false, name)
            };
            parts.push(Part { key, value, raw: rest[..length].to_owned(), implied });
            rest = rest[length..].strip_prefix(',').unwrap_or_default();
        }
        Self(parts)
    }
}

/// Returns the value at the beginning of a text, in which a comma is doubled, and how many bytes of the text it takes.
fn until_comma(text: &str) -> (String, usize) {
    let (mut value, mut at) = (String::new(), 0);
    while let Some(comma) = text[at..].find(',') {
        value.push_str(&text[at..at + comma]);
        at += comma;
        if !text[at..].starts_with(",,") {
            return (value, at);
        }
        value.push(',');
        at += 2;
    }
    value.push_str(&text[at..]);
    (value, text.len())
}

/// Writes a value so that QEMU does not end it at a comma.
pub fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

impl Properties for Options {
    fn get(&self, key: &str) -> Option<String> {
        self.0.iter().rfind(|part| part.key == key).map(|part| part.value.clone())
    }

    fn set(&mut self, key: &str, value: Value<'_>) {
        let value = value.text().to_owned();
        let at = self.0.iter().position(|part| part.key == key);
        let implied = at.is_some_and(|at| self.0[at].implied);
        let raw = if implied { escaped(&value) } else { format!("{key}={}", escaped(&value)) };
        let part = Part { key: key.to_owned(), value, raw, implied };
        let Some(at) = at else { return self.0.push(part) };
        self.0[at] = part;
        let mut number = 0..;
        self.0.retain(|part| number.next() <= Some(at) || part.key != key);
    }

    fn remove(&mut self, key: &str) {
        self.0.retain(|part| part.key != key);
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, part) in self.0.iter().enumerate() {
            let comma = if number == 0 { "" } else { "," };
            write!(f, "{comma}{}", part.raw)?;
        }
        Ok(())
    }
}

impl Properties for Map<String, Json> {
    fn get(&self, key: &str) -> Option<String> {
        Some(match Map::get(self, key)? {
            Json::String(text) => text.clone(),
            Json::Bool(switch) => Value::Switch(*switch).text().to_owned(),
            other => other.to_string(),
        })
    }

    fn set(&mut self, key: &str, value: Value<'_>) {
        let value = match value {
            Value::Text(text) => Json::from(text),
            Value::Switch(switch) => Json::from(switch),
        };
        self.insert(key.to_owned(), value);
    }

    fn remove(&mut self, key: &str) {
        Map::remove(self, key);
    }
}

/// The value of an option, in whichever of its two syntaxes it was given.
#[derive(Clone, Debug)]
pub enum Written {
    /// It is given as `key=value` pairs.
    Pairs(Options),
    /// It is given as JSON.
    Json(Map<String, Json>),
}

impl Written {
    /// Reads the value of an option. `first` is the key of a first part that names none.
    ///
    /// # Errors
    ///
    /// Fails if the value begins as JSON does, and is none.
    pub fn parse(text: &str, first: &str) -> Result<Self, serde_json::Error> {
        match text.starts_with('{') {
            true => serde_json::from_str(text).map(Self::Json),
            false => Ok(Self::Pairs(Options::parse(text, first))),
        }
    }
}

impl Properties for Written {
    fn get(&self, key: &str) -> Option<String> {
        match self {
            Self::Pairs(options) => options.get(key),
            Self::Json(object) => Properties::get(object, key),
        }
    }

    fn set(&mut self, key: &str, value: Value<'_>) {
        match self {
            Self::Pairs(options) => options.set(key, value),
            Self::Json(object) => object.set(key, value),
        }
    }

    fn remove(&mut self, key: &str) {
        match self {
            Self::Pairs(options) => options.remove(key),
            Self::Json(object) => Properties::remove(object, key),
        }
    }
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pairs(options) => options.fmt(f),
            Self::Json(object) => f.write_str(&Json::from(object.clone()).to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_written_as_they_were_read() {
        for text in [
            "",
            "memory-backend-ram,id=ram0,size=2G",
            "qom-type=memory-backend-ram,id=a,,b,host-nodes=0,host-nodes=2-3,share,nomerge",
            "web1,,x,debug-threads=on",
            "socket,path=/a=b,server,nowait",
        ] {
            assert_eq!(Options::parse(text, "first").to_string(), text);
        }
    }

    #[test]
    fn values_are_read_as_qemu_reads_them() {
        let options = Options::parse("a,,b,x=1,,2,share,nomerge,x=3,,,,", "first");
        assert_eq!(options.get("first").unwrap(), "a,b");
        assert_eq!(options.get("x").unwrap(), "3,,");
        assert!(options.is_on("share") && !options.is_on("merge") && !options.is_on("absent"));
        assert_eq!(options.get("merge").unwrap(), "off");
    }

    #[test]
    fn a_change_leaves_the_other_parts_alone() {
        let mut options = Options::parse("memory-backend-ram,size=1G,share=off,a=1,,2,share", "qom-type");
        options.set("share", Value::Switch(true));
        options.set("qom-type", Value::Text("memory-backend-file"));
        options.set("mem-path", Value::Text("/a,b"));
        options.remove("size");
        assert_eq!(options.to_string(), "memory-backend-file,share=on,a=1,,2,mem-path=/a,,b");
        let mut named = Options::parse("id=x,qom-type=memory-backend-ram", "qom-type");
        named.set("qom-type", Value::Text("memory-backend-file"));
        assert_eq!(named.to_string(), "id=x,qom-type=memory-backend-file");
    }

    #[test]
    fn both_syntaxes_are_changed_alike() {
        for (text, changed) in [
            ("vmgenid,guid=auto", "vmgenid,guid=x"),
            (r#"{"driver":"vmgenid","guid":"auto"}"#, r#"{"driver":"vmgenid","guid":"x"}"#),
        ] {
            let mut written = Written::parse(text, "driver").unwrap();
            assert_eq!(written.get("driver").as_deref(), Some("vmgenid"));
            written.set("guid", Value::Text("x"));
            assert_eq!(written.to_string(), changed);
            written.remove("guid");
            assert_eq!(written.get("guid"), None);
        }
        assert!(Written::parse("{", "driver").is_err());
    }

    #[test]
    fn json_keeps_its_kinds() {
        let mut object =
            serde_json::from_str::<Map<String, Json>>(r#"{"size":4096,"share":false,"id":"x"}"#).unwrap();
        assert_eq!(Properties::get(&object, "size").unwrap(), "4096");
        assert!(!object.is_on("share"));
        object.set("share", Value::Switch(true));
        object.set("mem-path", Value::Text("/dev/shm"));
        assert!(object.is_on("share"));
        assert_eq!(
            Json::Object(object).to_string(),
            r#"{"id":"x","mem-path":"/dev/shm","share":true,"size":4096}"#
        );
    }
}
