//! The formula of a `multi` grader: numbers, names, `+ - * / ^`, parentheses, a few functions.

use std::collections::BTreeMap;

/// What may be called; `min` and `max` take any number of arguments, the others one.
pub(super) const FUNCTIONS: [&str; 8] =
    ["min", "max", "abs", "floor", "ceil", "exp", "sqrt", "log"];
/// How deep parentheses, calls and signs may be nested.
const MAX_DEPTH: usize = 64;

/// A formula, read.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Formula(Expression);

#[derive(Debug, Clone, PartialEq)]
enum Expression {
    Number(f64),
    Name(String),
    Negated(Box<Expression>),
    Binary(char, Box<Expression>, Box<Expression>),
    Call(&'static str, Vec<Expression>),
}

impl Formula {
    /// Reads a formula; the error says what is wrong with it.
    pub(super) fn parse(source: &str) -> Result<Self, String> {
        let mut reader = Reader { rest: source, depth: 0 };
        let expression = reader.sum()?;
        match reader.peek() {
            None => Ok(Self(expression)),
            Some(other) => Err(format!("there is no place for '{other}'")),
        }
    }

    /// The names in it.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        self.0.collect_names(&mut names);
        names
    }

    /// Its value; NaN if a name has none.
    pub(super) fn value(&self, names: &BTreeMap<String, f64>) -> f64 {
        self.0.value(names)
    }
}

impl Expression {
    fn collect_names(&self, names: &mut Vec<String>) {
        match self {
            Self::Number(_) => {}
            Self::Name(name) => names.push(name.clone()),
            Self::Negated(inner) => inner.collect_names(names),
            Self::Binary(_, left, right) => {
                left.collect_names(names);
                right.collect_names(names);
            }
            Self::Call(_, arguments) => {
                arguments.iter().for_each(|argument| argument.collect_names(names));
            }
        }
    }

    fn value(&self, names: &BTreeMap<String, f64>) -> f64 {
        match self {
            Self::Number(number) => *number,
            Self::Name(name) => names.get(name).copied().unwrap_or(f64::NAN),
            Self::Negated(inner) => -inner.value(names),
            Self::Binary(operator, left, right) => {
                let (left, right) = (left.value(names), right.value(names));
                match operator {
                    '+' => left + right,
                    '-' => left - right,
                    '*' => left * right,
                    '/' => left / right,
                    _ => left.powf(right),
                }
            }
            Self::Call(function, arguments) => {
                let values = arguments.iter().map(|argument| argument.value(names));
                let one = arguments.first().map_or(f64::NAN, |argument| argument.value(names));
                match *function {
                    "min" => values.fold(f64::INFINITY, f64::min),
                    "max" => values.fold(f64::NEG_INFINITY, f64::max),
                    "abs" => one.abs(),
                    "floor" => one.floor(),
                    "ceil" => one.ceil(),
                    "exp" => one.exp(),
                    "sqrt" => one.sqrt(),
                    _ => one.ln(),
                }
            }
        }
    }
}

struct Reader<'a> {
    rest: &'a str,
    depth: usize,
}

impl Reader<'_> {
    fn peek(&mut self) -> Option<char> {
        self.rest = self.rest.trim_start();
        self.rest.chars().next()
    }

    fn take(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        if found {
            self.rest = &self.rest[wanted.len_utf8()..];
        }
        found
    }

    fn expect(&mut self, wanted: char) -> Result<(), String> {
        if self.take(wanted) {
            return Ok(());
        }
        let found = self.peek().map_or("its end".to_owned(), |c| format!("'{c}'"));
        Err(format!("'{wanted}' is expected before {found}"))
    }

    fn deeper<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, String>,
    ) -> Result<T, String> {
        if self.depth == MAX_DEPTH {
            return Err(format!("it is nested deeper than {MAX_DEPTH}"));
        }
        self.depth += 1;
        let value = read(self);
        self.depth -= 1;
        value
    }

    fn left(
        &mut self,
        operators: [char; 2],
        next: fn(&mut Self) -> Result<Expression, String>,
    ) -> Result<Expression, String> {
        let mut left = next(self)?;
        while let Some(operator) = self.peek().filter(|c| operators.contains(c)) {
            self.take(operator);
            left = Expression::Binary(operator, Box::new(left), Box::new(next(self)?));
        }
        Ok(left)
    }

    fn sum(&mut self) -> Result<Expression, String> {
        self.left(['+', '-'], Self::product)
    }

    fn product(&mut self) -> Result<Expression, String> {
        self.left(['*', '/'], Self::signed)
    }

    /// A sign binds less than a power, as in mathematics: -2^2 is -4.
    fn signed(&mut self) -> Result<Expression, String> {
        if self.take('-') {
            return self.deeper(|it| Ok(Expression::Negated(Box::new(it.signed()?))));
        }
        self.power()
    }

    /// Powers group from the right: 2^3^2 is 2^9.
    fn power(&mut self) -> Result<Expression, String> {
        let base = self.atom()?;
        if !self.take('^') {
            return Ok(base);
        }
        let exponent = self.deeper(Self::signed)?;
        Ok(Expression::Binary('^', Box::new(base), Box::new(exponent)))
    }

    fn atom(&mut self) -> Result<Expression, String> {
        match self.peek() {
            None => Err("it ends too soon".to_owned()),
            Some('(') => {
                self.take('(');
                let inner = self.deeper(Self::sum)?;
                self.expect(')')?;
                Ok(inner)
            }
            Some(c) if c.is_ascii_digit() || c == '.' => self.number(),
            Some(c) if c.is_alphabetic() || c == '_' => self.name(),
            Some(other) => Err(format!("there is no place for '{other}'")),
        }
    }

    fn number(&mut self) -> Result<Expression, String> {
        let bytes = self.rest.as_bytes();
        let mut end = 0;
        while end < bytes.len() {
            let exponent = end > 0 && matches!(bytes[end - 1], b'e' | b'E');
            let sign = exponent && matches!(bytes[end], b'+' | b'-');
            if !(bytes[end].is_ascii_digit() || matches!(bytes[end], b'.' | b'e' | b'E') || sign) {
                break;
            }
            end += 1;
        }
        let (number, rest) = self.rest.split_at(end);
        self.rest = rest;
        number.parse().map(Expression::Number).map_err(|_| format!("{number} is no number"))
    }

    fn name(&mut self) -> Result<Expression, String> {
        let end =
            self.rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(self.rest.len());
        let (name, rest) = self.rest.split_at(end);
        self.rest = rest;
        if !self.take('(') {
            return Ok(Expression::Name(name.to_owned()));
        }
        let function = FUNCTIONS.into_iter().find(|function| *function == name);
        let function = function.ok_or_else(|| format!("there is no function {name}"))?;
        let mut arguments = vec![self.deeper(Self::sum)?];
        while self.take(',') {
            arguments.push(self.deeper(Self::sum)?);
        }
        self.expect(')')?;
        if arguments.len() > 1 && !matches!(function, "min" | "max") {
            return Err(format!("{function} takes one argument"));
        }
        Ok(Expression::Call(function, arguments))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(source: &str) -> f64 {
        let names = [("a".to_owned(), 0.5), ("b_2".to_owned(), 4.0)].into();
        Formula::parse(source).expect(source).value(&names)
    }

    #[test]
    fn operators_bind_as_in_mathematics() {
        for (source, expected) in [
            ("1 + 2 * 3", 7.0),
            ("(1 + 2) * 3", 9.0),
            ("8 - 2 - 1", 5.0),
            ("8 / 2 / 2", 2.0),
            ("2 ^ 3 ^ 2", 512.0),
            ("-2 ^ 2", -4.0),
            ("2 ^ -1", 0.5),
            ("--3", 3.0),
            ("1.5e1 + .5", 15.5),
            ("a * b_2 - a", 1.5),
            ("min(3, a, b_2) + max(1, 2)", 2.5),
            ("sqrt(b_2) + abs(-1) + floor(1.9) + ceil(0.1)", 5.0),
            ("log(exp(2))", 2.0),
        ] {
            assert_eq!(value(source), expected, "{source}");
        }
    }

    #[test]
    fn what_is_no_formula_is_refused_with_the_reason() {
        for (source, reason) in [
            ("", "ends too soon"),
            ("1 +", "ends too soon"),
            ("(1", "')' is expected before its end"),
            ("1 2", "no place for '2'"),
            ("1 % 2", "no place for '%'"),
            ("system(1)", "no function system"),
            ("abs(1, 2)", "abs takes one argument"),
            ("1.2.3", "1.2.3 is no number"),
        ] {
            let error = Formula::parse(source).expect_err(source);
            assert!(error.contains(reason), "{source}: {error}");
        }
        let deep = "(".repeat(100_000);
        assert!(Formula::parse(&deep).expect_err("deep").contains("deeper"));
        assert!(Formula::parse(&"-".repeat(100_000)).expect_err("deep").contains("deeper"));
    }
}
