//! Converts Parquet to JSON lines.
//!
//! Parquet stores columns in compressed pages, and reading one value decompresses a page: rows in random
//! order would decompress the same pages over and over. So a file is read once, and its rows are written to a
//! temporary file.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{ConvertedType, LogicalType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Value};

use crate::system::heartbeat;
use crate::system::progress::DelayedProgress;
use crate::{Error, Result};

/// Writes each row of a file as a line of a temporary file. Columns other than texts, numbers, booleans and
/// lists of these are left out.
///
/// # Errors
/// The file is not Parquet, is damaged, or has an unknown compression; the disk is full.
pub(super) fn to_json_lines(path: &Path, file: File) -> Result<File> {
    let wrong = |error: ParquetError| Error::file(path, format!("cannot read this as Parquet: {error}"));
    let reader = SerializedFileReader::new(file).map_err(wrong)?;
    let schema = reader.metadata().file_metadata().schema();
    let fields: Vec<Arc<Type>> = schema.get_fields().iter().filter(|field| simple(field)).cloned().collect();
    let projection = Type::group_type_builder(schema.name()).with_fields(fields).build().map_err(wrong)?;
    let plain = tempfile::tempfile().map_err(Error::read("unpack", path))?;
    let mut lines = BufWriter::with_capacity(1 << 20, plain);
    let rows = u64::try_from(reader.metadata().file_metadata().num_rows()).unwrap_or_default();
    let mut progress = DelayedProgress::new("unpacking", path, "rows", rows);
    for (number, row) in reader.get_row_iter(Some(projection)).map_err(wrong)?.enumerate() {
        let row = row.map_err(|error| Error::Row {
            path: path.to_owned(),
            line: number as u64 + 1,
            message: format!("cannot read this row as Parquet: {error}"),
        })?;
        serde_json::to_writer(&mut lines, &object(row))
            .map_err(std::io::Error::from)
            .and_then(|()| lines.write_all(b"\n"))
            .map_err(Error::read("unpack", path))?;
        progress.advance(1);
        heartbeat::record_work();
    }
    lines.into_inner().map_err(|error| Error::read("unpack", path)(error.into_error()))
}

/// Whether a column has plain values or lists of them. Images and other structures would only take space.
fn simple(field: &Type) -> bool {
    if field.is_primitive() {
        return true;
    }
    let info = field.get_basic_info();
    let list =
        info.converted_type() == ConvertedType::LIST || info.logical_type_ref() == Some(&LogicalType::List);
    // optional group NAME (LIST) { repeated group list { optional TYPE element; } }
    let inner = field.get_fields();
    list && inner
        .iter()
        .all(|inner| inner.is_primitive() || inner.get_fields().iter().all(|one| one.is_primitive()))
}

fn object(row: Row) -> Map<String, Value> {
    row.into_columns().into_iter().map(|(name, field)| (name, value(&field))).collect()
}

fn value(field: &Field) -> Value {
    match field {
        Field::Bool(value) => Value::from(*value),
        Field::Byte(number) => Value::from(*number),
        Field::Short(number) => Value::from(*number),
        Field::Int(number) => Value::from(*number),
        Field::Long(number) => Value::from(*number),
        Field::UByte(number) => Value::from(*number),
        Field::UShort(number) => Value::from(*number),
        Field::UInt(number) => Value::from(*number),
        Field::ULong(number) => Value::from(*number),
        Field::Float16(number) => float(number.to_f64()),
        Field::Float(number) => float(f64::from(*number)),
        Field::Double(number) => float(*number),
        Field::Str(text) => Value::from(text.as_str()),
        // Old writers do not mark text as such.
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Value::from),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        _ => Value::Null,
    }
}

/// A number; JSON has no NaN and no infinity, so these become text, which the message for a wrong number then
/// shows.
fn float(number: f64) -> Value {
    if number.is_finite() { Value::from(number) } else { Value::from(number.to_string()) }
}

#[cfg(test)]
mod tests {
    use parquet::basic::Compression;
    use parquet::data_type::{ByteArray, ByteArrayType, DoubleType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use crate::config::DataSet;
    use crate::data::reader::Source;
    use crate::data::row::Row;

    const PAIRS: &str = "message rows {
        required binary query (UTF8);
        optional binary positive (UTF8);
        optional group negatives (LIST) { repeated group list { optional binary element (UTF8); } }
        optional group picture { optional binary bytes; }
    }";

    /// A file of two groups of rows, packed.
    fn pairs(compression: Compression) -> Vec<u8> {
        let texts = |texts: &[&str]| texts.iter().map(|text| ByteArray::from(*text)).collect::<Vec<_>>();
        let properties = WriterProperties::builder().set_compression(compression).build();
        let schema = parse_message_type(PAIRS).unwrap().into();
        let mut writer = SerializedFileWriter::new(Vec::new(), schema, properties.into()).unwrap();
        for (queries, positives, there, negatives, levels, starts) in [
            (["a", "b"], &["x", "y"][..], [1, 1], &["n", "m", "é"][..], &[3, 3, 3][..], &[0, 1, 0][..]),
            (["c", "d"], &["z", "😀"][..], [1, 1], &[][..], &[0, 1][..], &[0, 0][..]),
        ] {
            let mut group = writer.next_row_group().unwrap();
            let mut put = |values: &[ByteArray], levels: Option<&[i16]>, starts: Option<&[i16]>| {
                let mut column = group.next_column().unwrap().unwrap();
                column.typed::<ByteArrayType>().write_batch(values, levels, starts).unwrap();
                column.close().unwrap();
            };
            put(&texts(&queries), None, None);
            put(&texts(positives), Some(&there[..]), None);
            put(&texts(negatives), Some(levels), Some(starts));
            put(&[], Some(&[0, 0][..]), None);
            group.close().unwrap();
        }
        writer.into_inner().unwrap()
    }

    fn open(bytes: &[u8], name: &str) -> crate::Result<Source> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        Source::open(&DataSet { path, ..DataSet::default() })
    }

    #[test]
    fn rows_come_from_any_place_of_packed_columns() {
        let compressions = [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::ZSTD(Default::default()),
            Compression::GZIP(Default::default()),
            Compression::LZ4_RAW,
        ];
        for compression in compressions {
            let bytes = pairs(compression);
            let source = open(&bytes, "a.parquet").unwrap();
            let row = |query: &str, positive: &str, negatives: &[&str]| Row {
                query: query.to_owned(),
                positives: vec![positive.to_owned()],
                negatives: negatives.iter().map(|text| (*text).to_owned()).collect(),
                ..Row::default()
            };
            let expected =
                [row("a", "x", &["n", "m"]), row("b", "y", &["é"]), row("c", "z", &[]), row("d", "😀", &[])];
            for at in [3, 0, 2, 1] {
                assert_eq!(source.row(at).unwrap(), expected[at as usize], "{compression:?}");
            }
            assert_eq!(source.len(), 4);
            let packed = zstd::encode_all(&bytes[..], 1).unwrap();
            assert_eq!(open(&packed, "a.parquet.zst").unwrap().digest(), source.digest());
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_row() {
        let bytes = pairs(Compression::SNAPPY);
        let message = |bytes: &[u8]| open(bytes, "a.parquet").err().unwrap().to_string();
        let error = message(b"no parquet at all");
        assert!(error.contains("a.parquet: cannot read this as Parquet: "), "{error}");
        let error = message(&bytes[..bytes.len() - 40]);
        assert!(error.contains("a.parquet: cannot read this as Parquet: "), "{error}");

        let schema =
            "message rows { required binary s1 (UTF8); required binary s2 (UTF8); optional double score; }";
        let schema = parse_message_type(schema).unwrap().into();
        let mut writer = SerializedFileWriter::new(Vec::new(), schema, Default::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for _ in 0..2 {
            let mut column = group.next_column().unwrap().unwrap();
            let texts = ["a", "b", "c"].map(ByteArray::from);
            column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
            column.close().unwrap();
        }
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<DoubleType>().write_batch(&[0.5, 2.0, f64::NAN], Some(&[1, 1, 1][..]), None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        let error = message(&writer.into_inner().unwrap());
        assert!(error.ends_with("a.parquet:3: `score` is NaN, expected a finite number"), "{error}");
    }
}
