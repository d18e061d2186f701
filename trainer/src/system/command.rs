//! The command line that started this process, for messages that repeat it.

use std::env;
use std::path::Path;

/// The variable in which `launch` passes its own command line to the processes it starts.
pub const VARIABLE: &str = "LODESTONE_COMMAND";

/// The command line that the user typed, as a shell reads it.
pub fn line() -> String {
    env::var(VARIABLE)
        .unwrap_or_else(|_| quote(env::args_os().map(|word| word.to_string_lossy().into_owned())))
}

/// Joins the words of a command line and quotes those that a shell would change. The program is named without its folder.
pub fn quote(words: impl IntoIterator<Item = String>) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    let quoted = |word: String| match !word.is_empty() && word.chars().all(plain) {
        true => word,
        false => format!("'{}'", word.replace('\'', r"'\''")),
    };
    let mut words = words.into_iter();
    let program = words.next().unwrap_or_default();
    let program = Path::new(&program).file_name().unwrap_or_default().to_string_lossy().into_owned();
    [program].into_iter().chain(words).map(quoted).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_can_be_pasted_into_a_shell() {
        let words = ["/usr/bin/launch", "--cpus", "2", "my run.yaml", "data.train.0.query_prompt=it's: "];
        assert_eq!(
            quote(words.map(str::to_owned)),
            r"launch --cpus 2 'my run.yaml' 'data.train.0.query_prompt=it'\''s: '"
        );
    }
}
