# keep(<result> <package> <folder>...)
#
# Copies folders of another package into the build folder, under a name made from their content. An isolated
# build has them elsewhere each time, with new dates; what was compiled with the copies stays valid as long as
# their content does.
function(keep result package)
  set(contents "")
  foreach(folder IN LISTS ARGN)
    file(
      GLOB_RECURSE files
      RELATIVE "${package}"
      "${package}/${folder}/*")
    list(FILTER files EXCLUDE REGEX "__pycache__|\\.gch$")
    foreach(file IN LISTS files)
      file(SHA256 "${package}/${file}" hash)
      string(APPEND contents "${hash} ${file}\n")
    endforeach()
  endforeach()
  string(SHA256 name "${contents}")
  set(copy "${CMAKE_BINARY_DIR}/kept/${name}")
  if(NOT EXISTS "${copy}")
    file(REMOVE_RECURSE "${copy}.part")
    list(TRANSFORM ARGN PREPEND "${package}/")
    file(
      COPY ${ARGN}
      DESTINATION "${copy}.part"
      PATTERN "*.gch" EXCLUDE)
    file(RENAME "${copy}.part" "${copy}")
  endif()
  set(${result}
      "${copy}"
      PARENT_SCOPE)
endfunction()
