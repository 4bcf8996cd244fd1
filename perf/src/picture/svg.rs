//! The writer of SVG.

use std::fmt::{self, Display, Write as _};

/// Elements of SVG, one after the other.
#[derive(Debug, Default, Clone)]
pub(crate) struct Svg {
    text: String,
}

/// A length or a place in a picture. Tenths are fine enough, and keep pictures small.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Px(pub f64);

/// A text that is escaped for XML, also inside of attributes.
pub(crate) struct Escaped<'a>(pub &'a str);

/// The point at which a text is anchored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

impl Svg {
    /// Adds an element without contents.
    pub(crate) fn add(&mut self, name: &str, class: &str, attributes: &[(&str, &dyn Display)]) {
        self.open(name, class, attributes, "/>");
    }

    /// Adds a text whose base line begins, is centred, or ends at a place.
    pub(crate) fn text(&mut self, class: &str, anchor: Anchor, (x, y): (f64, f64), text: &str) {
        let anchor: &[(&str, &dyn Display)] = match anchor {
            Anchor::Start => &[],
            Anchor::Middle => &[("text-anchor", &"middle")],
            Anchor::End => &[("text-anchor", &"end")],
        };
        let place: [(&str, &dyn Display); 2] = [("x", &Px(x)), ("y", &Px(y))];
        self.open("text", class, &[&place, anchor].concat(), ">");
        // Writing to a string never fails.
        let _ = write!(self.text, "{}</text>", Escaped(text));
    }

    /// Adds texts one after another, each so far from the one before, however wide the reader's font is.
    pub(crate) fn texts(&mut self, (x, y): (f64, f64), texts: &[(f64, &str, &str)]) {
        self.open("text", "", &[("x", &Px(x)), ("y", &Px(y))], ">");
        for (apart, class, text) in texts {
            self.open("tspan", class, &[("dx", &Px(*apart))], ">");
            let _ = write!(self.text, "{}</tspan>", Escaped(text));
        }
        self.text.push_str("</text>");
    }

    /// Adds a line through points; nothing if there is no second one.
    pub(crate) fn line(&mut self, class: &str, points: &[(f64, f64)]) {
        if points.len() > 1 {
            self.add("path", class, &[("d", &path(points))]);
        }
    }

    /// Adds a surface within points.
    pub(crate) fn surface(&mut self, class: &str, points: &[(f64, f64)]) {
        if points.len() > 2 {
            self.add("path", class, &[("d", &format!("{}z", path(points)))]);
        }
    }

    /// Adds a rectangle; one without a surface is left out.
    pub(crate) fn rectangle(&mut self, class: &str, (x, y): (f64, f64), (width, height): (f64, f64)) {
        if width > 0.0 && height > 0.0 {
            let attributes: [(&str, &dyn Display); 4] =
                [("x", &Px(x)), ("y", &Px(y)), ("width", &Px(width)), ("height", &Px(height))];
            self.add("rect", class, &attributes);
        }
    }

    /// Adds a disc.
    pub(crate) fn dot(&mut self, class: &str, (x, y): (f64, f64), radius: f64) {
        self.add("circle", class, &[("cx", &Px(x)), ("cy", &Px(y)), ("r", &Px(radius))]);
    }

    /// Returns all elements in an element of its own, of this size. It says in words what the picture shows, for
    /// readers who cannot see it.
    pub(crate) fn picture(&self, (width, height): (f64, f64), tells: &str, style: &str) -> String {
        let (width, height) = (Px(width), Px(height));
        let style = if style.is_empty() { String::new() } else { format!("<style>{style}</style>\n") };
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" role=\"img\">\n\
             <title>{}</title>\n{style}{}</svg>\n",
            Escaped(tells),
            self.text
        )
    }

    fn open(&mut self, name: &str, class: &str, attributes: &[(&str, &dyn Display)], end: &str) {
        // Writing to a string never fails.
        let _ = write!(self.text, "<{name}");
        if !class.is_empty() {
            let _ = write!(self.text, " class=\"{}\"", Escaped(class));
        }
        for (attribute, value) in attributes {
            let _ = write!(self.text, " {attribute}=\"{}\"", Escaped(&value.to_string()));
        }
        self.text += end;
        if end == "/>" {
            self.text.push('\n');
        }
    }
}

fn path(points: &[(f64, f64)]) -> String {
    let mut path = String::new();
    for (index, (x, y)) in points.iter().enumerate() {
        let _ = write!(path, "{}{} {}", if index == 0 { 'M' } else { 'L' }, Px(*x), Px(*y));
    }
    path
}

impl Display for Px {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tenths = (self.0 * 10.0).round();
        // What is no number cannot be drawn, and must not spoil the rest.
        let tenths = if tenths.is_finite() { tenths as i64 } else { 0 };
        let (sign, tenths) = (if tenths < 0 { "-" } else { "" }, tenths.unsigned_abs());
        match (tenths / 10, tenths % 10) {
            (whole, 0) => write!(f, "{sign}{whole}"),
            (whole, rest) => write!(f, "{sign}{whole}.{rest}"),
        }
    }
}

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '&' => f.write_str("&amp;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                // XML has no place for others.
                '\t' | '\n' | ' '.. => f.write_char(character)?,
                _ => f.write_char('\u{fffd}')?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_shown_becomes_markup() {
        let text = Escaped("<b> & \"quotes\" 'too'\u{1}").to_string();
        assert_eq!(text, "&lt;b&gt; &amp; &quot;quotes&quot; &#39;too&#39;\u{fffd}");
        let mut svg = Svg::default();
        svg.text("a\"b", Anchor::End, (1.0, 2.0), "1 < 2");
        let picture = svg.picture((10.0, 20.5), "</title>", "");
        assert!(picture.contains("class=\"a&quot;b\" x=\"1\" y=\"2\" text-anchor=\"end\">1 &lt; 2</text>"));
        assert!(picture.contains("<title>&lt;/title&gt;</title>"), "{picture}");
        assert!(picture.contains("viewBox=\"0 0 10 20.5\""), "{picture}");
    }

    #[test]
    fn places_are_short_and_always_numbers() {
        let text = |px| Px(px).to_string();
        assert_eq!([12.0, 12.04, -0.06, -3.25, -0.04].map(text), ["12", "12", "-0.1", "-3.3", "0"]);
        assert_eq!([f64::NAN, f64::INFINITY].map(text), ["0", "0"]);
    }

    #[test]
    fn what_cannot_be_seen_is_left_out() {
        let mut svg = Svg::default();
        svg.line("a", &[(0.0, 0.0)]);
        svg.surface("a", &[(0.0, 0.0), (1.0, 1.0)]);
        svg.rectangle("a", (0.0, 0.0), (0.0, 5.0));
        assert_eq!(svg.text, "");
        svg.line("a", &[(0.0, 0.0), (1.5, 1.0)]);
        assert_eq!(svg.text, "<path class=\"a\" d=\"M0 0L1.5 1\"/>\n");
    }
}
