"""The codes store: what a codec has made of media, found again by any run, recipe and user that names the store.

`CODES/ENCODING/data/*.parquet` are files of codes (`tokenization.codecs.codes_file`), a few to a partition, and
`index/*.parquet` say which objects each file has, for all files at once. ENCODING hashes what decides the codes beside
the medium. No lease covers a store that many runs share: files are created and never changed. Of two tasks that encode
the same media the first to commit wins, and the other starts again and finds them. Only `ringworld clean` removes any,
once it has the lease of every run that `runs/*.json` name (`pipelines.tokenize.codes.users`).
"""
