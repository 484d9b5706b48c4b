/* Files inside the program: the page and the description of the interface. The table is made by the
 * build. */
#ifndef QIE_SERVICE_PAGE_H
#define QIE_SERVICE_PAGE_H

typedef struct svc_page_file {
    const char *name; /* "index.html", "openapi.json" */
    const unsigned char *data, *end;
} svc_page_file;

/* Ended by a NULL name. */
extern const svc_page_file svc_page_files[];

#endif
