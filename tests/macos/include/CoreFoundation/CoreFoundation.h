// What metal-cpp uses of Apple's header.
#pragma once

typedef const void* CFTypeRef;
typedef double CFTimeInterval;
