# cmake -DROOT=<repository> -DLIST=<sorted paths under src/> -DOUT=<file.cc> -P source_hash.cmake
#
# Writes a C++ file that holds what this prints in ROOT:
#   find src -type f | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c1-16
file(STRINGS "${LIST}" paths)
set(lines "")
foreach(path IN LISTS paths)
  file(SHA256 "${ROOT}/${path}" hash)
  string(APPEND lines "${hash}  ${path}\n")
endforeach()
string(SHA256 hash "${lines}")
string(SUBSTRING "${hash}" 0 16 hash)
file(WRITE "${OUT}"
  "extern const char* const kSourceHash;\nconst char* const kSourceHash = \"${hash}\";\n")
